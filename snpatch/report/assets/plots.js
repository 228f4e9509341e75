// Plots of one judge, recipient, set and strength, in the colours of the page.

const PALETTE = {
  light: ["#0b62a8", "#c4501b", "#1a7f4b", "#8a3ea8", "#946000", "#b0285a"],
  dark: ["#6cb6ff", "#ff9b6a", "#5fd08f", "#d29bf0", "#e5b94e", "#ff8fb3"],
};

const isDark = () => byId("theme").getAttribute("aria-pressed") === "true";
const hue = at => PALETTE[isDark() ? "dark" : "light"].at(at % 6);
const pale = colour => `${colour}2e`;

/** What a colour of the style sheet is just now. */
const ink = name => {
  const probe = document.body.appendChild(element("i", {style: `color: var(--${name})`}));
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
};

/** A name as Plotly shows it as it is: it reads pseudo-HTML, with links, in all texts. */
const plain = name => {
  const text = String(name), cut = text.length > 60 ? `${text.slice(0, 60)}…` : text;
  return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
};

const draw = (id, traces, layout, told) => {
  const [text, line, faint] = [ink("ink"), ink("line"), ink("faint")];
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: faint, automargin: true};
  byId(id).setAttribute("aria-label", told);
  Plotly.react(id, traces, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: text, family: "system-ui, sans-serif", size: 13},
    margin: {l: 56, r: 12, t: 12, b: 48},
    hovermode: "closest",
    hoverlabel: {bgcolor: ink("panel"), font: {color: text}},
    legend: {orientation: "h", yref: "container", y: 1, yanchor: "top", x: 0},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: text},
    ...layout,
    xaxis: {...axis, ...layout.xaxis},
    yaxis: {...axis, ...layout.yaxis},
  }, {responsive: true, displaylogo: false});
};

const rankingsOf = rows => distinct(rows.map(row => row.ranking).filter(isDefined));
const byEnd = rows => rows.toSorted((one, other) => one.hi - other.hi || one.lo - other.lo);
const isTop = row => row.lo === 0;

/** How far an interval reaches from its figure to a side, low or high. */
const distance = (row, name, side) => {
  const end = row[`${name}_${side}`];
  return isDefined(end) ? Math.abs(end - row[name]) : null;
};

const hover = (row, name) => {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  return plain(cell(row[name]) + (isDefined(low) ? ` [${cell(low)}, ${cell(high)}]` : ""));
};

/** Error bars of rows, each `repeat` points of a trace of which the one at `at` has the bar. */
const bars = (rows, name, repeat = 1, at = 0) => {
  const away = side => rows.flatMap(row => Array(repeat).fill(null).with(at, distance(row, name, side)));
  return {type: "data", symmetric: false, array: away("high"), arrayminus: away("low"), thickness: 1.2, width: 3};
};

/** Windows that do not begin at rank 0: each a bar over its ranks, with its interval in the middle. */
const windows = (rows, name, look) => {
  const shown = rows.filter(row => !isTop(row) && isDefined(row[name]));
  return shown.length ? [{
    x: shown.flatMap(row => [row.lo, (row.lo + row.hi) / 2, row.hi, null]),
    y: shown.flatMap(row => [row[name], row[name], row[name], null]),
    text: shown.flatMap(row => Array(4).fill(`ranks ${plain(row.lo)} to ${plain(row.hi)}: ${hover(row, name)}`)),
    hovertemplate: "%{text}", mode: "lines", error_y: bars(shown, name, 4, 1), ...look,
  }] : [];
};

/** Mean score against k: a line and a band for each ranking, its random controls in grey, unpatched models dashed. */
const drawMean = (rows, unpatched) => {
  const end = Math.max(1, ...rows.map(row => row.hi));
  const traces = unpatched.map(({label, row}, at) => ({
    x: [0, end], y: [row.mean, row.mean], mode: "lines", name: plain(label), text: hover(row, "mean"),
    hovertemplate: "%{text}", line: {color: ink("ink"), width: 1.5, dash: at ? "dot" : "dash"},
  }));
  const random = {name: "random controls", legendgroup: "controls", line: {color: ink("control"), width: 1}};
  for (const [at, ranking] of rankingsOf(rows).entries()) {
    const mine = byEnd(rows.filter(row => row.ranking === ranking && isDefined(row.mean)));
    for (const seed of distinct(mine.map(row => row.control_seed).filter(isDefined))) {
      const control = mine.filter(row => row.control_seed === seed), top = control.filter(isTop);
      if (top.length) traces.push({
        x: top.map(row => row.hi), y: top.map(row => row.mean),
        text: top.map(row => `${hover(row, "mean")}, seed ${plain(seed)}`),
        hovertemplate: "k %{x}: %{text}", mode: "lines", ...random,
      });
      traces.push(...windows(control, "mean", {...random, error_y: {}}));
    }
    const own = mine.filter(row => !isDefined(row.control_seed));
    const top = own.filter(isTop);
    const sure = top.filter(row => isDefined(row.mean_low));
    traces.push({
      x: [...sure, ...sure.toReversed()].map(row => row.hi),
      y: [...sure.map(row => row.mean_low), ...sure.toReversed().map(row => row.mean_high)],
      fill: "toself", fillcolor: pale(hue(at)), line: {width: 0}, mode: "lines", hoverinfo: "skip",
      legendgroup: ranking, showlegend: false,
    }, {
      x: top.map(row => row.hi), y: top.map(row => row.mean), text: top.map(row => hover(row, "mean")),
      hovertemplate: "k %{x}: %{text}", mode: "lines+markers", name: plain(ranking), legendgroup: ranking,
      line: {color: hue(at), width: 2}, marker: {size: 6},
    });
    traces.push(...windows(own, "mean", {name: plain(`${ranking}, windows`), line: {color: hue(at), width: 3}}));
  }
  traces.filter(trace => trace.legendgroup === "controls").forEach((trace, i) => trace.showlegend = i === 0);
  draw("plot-mean", traces, {xaxis: {title: {text: "k, neurons patched"}}, yaxis: {title: {text: "mean score"}}},
    `Mean score against k for ${rankingsOf(rows).join(", ") || "no ranking"}; the table of rows has the figures`);
};

/** Causal effect and net effect against k, with their intervals. */
const drawEffect = rows => {
  const traces = [];
  for (const [at, ranking] of rankingsOf(rows).entries()) {
    const own = byEnd(rows.filter(row => row.ranking === ranking && !isDefined(row.control_seed)));
    for (const [name, dash, symbol] of [["effect", "solid", "circle"], ["net", "dot", "circle-open"]]) {
      const mine = own.filter(row => isTop(row) && isDefined(row[name]));
      const label = name === "net" ? `${ranking}, net` : ranking;
      if (mine.length) traces.push({
        x: mine.map(row => row.hi), y: mine.map(row => row[name]), text: mine.map(row => hover(row, name)),
        hovertemplate: "k %{x}: %{text}", mode: "lines+markers", name: plain(label),
        line: {color: hue(at), width: 2, dash}, marker: {symbol, size: 8},
        error_y: bars(mine, name),
      });
      traces.push(...windows(own, name, {name: plain(`${label}, windows`), line: {color: hue(at), width: 3, dash}}));
    }
  }
  byId("effects").hidden = !traces.length;
  if (traces.length) draw("plot-effect", traces, {
    xaxis: {title: {text: "k, neurons patched"}},
    yaxis: {title: {text: "effect"}, tickformat: ".0%"},
    shapes: [0, 1].map(y => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: {color: ink("faint"), width: 1},
    })),
  }, "Causal effect and net effect against k; the table of rows has the figures");
};

/** A map of layers and rank bins for each ranking. */
const drawMaps = maps => {
  const scale = [[0, ink("panel")], [1, ink("accent")]];
  for (const [at, [ranking, map]] of Object.entries(maps).entries()) {
    draw(`map-${at}`, [{
      type: "heatmap", z: map.values, colorscale: scale, xgap: map.bins > 60 ? 0 : 1, ygap: map.layers > 40 ? 0 : 1,
      hovertemplate: "layer %{y}, bin %{x}: %{z:.3g}<extra></extra>", colorbar: {thickness: 12, outlinewidth: 0},
    }], {
      xaxis: {title: {text: "rank bin, best first"}, showgrid: false},
      yaxis: {title: {text: "layer"}, showgrid: false},
    }, `Map of ${ranking}: ${map.layers} layers, ${map.bins} bins of ranks`);
  }
};
