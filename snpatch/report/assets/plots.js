// Plots of one judge, recipient, set and strength, in the colors of the page.

const PALETTE = {
  light: ["#0b62a8", "#c4501b", "#1a7f4b", "#8a3ea8", "#946000", "#b0285a"],
  dark: ["#6cb6ff", "#ff9b6a", "#5fd08f", "#d29bf0", "#e5b94e", "#ff8fb3"],
};

const isDark = () => byId("theme").getAttribute("aria-pressed") === "true";
const rankingColor = at => PALETTE[isDark() ? "dark" : "light"].at(at % 6);
const translucent = color => `${color}2e`;

/** Return the current value of one of the style sheet's colors. */
const cssColor = name => {
  const probe = document.body.appendChild(element("i", {style: `color: var(--${name})`}));
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
};

/** Escape a name, because Plotly interprets pseudo-HTML, with links, in every text. */
const escapeLabel = name => {
  const text = String(name), label = text.length > 60 ? `${text.slice(0, 60)}…` : text;
  return label.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
};

/** Draw a plot in the page's colors. description: its text for screen readers. */
const drawPlot = (id, traces, layout, description) => {
  const [text, line, faint] = [cssColor("ink"), cssColor("line"), cssColor("faint")];
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: faint, automargin: true};
  byId(id).setAttribute("aria-label", description);
  Plotly.react(id, traces, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: text, family: "system-ui, sans-serif", size: 13},
    margin: {l: 56, r: 12, t: 12, b: 48},
    hovermode: "closest",
    hoverlabel: {bgcolor: cssColor("panel"), font: {color: text}},
    legend: {orientation: "h", yref: "container", y: 1, yanchor: "top", x: 0},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: text},
    ...layout,
    xaxis: {...axis, ...layout.xaxis},
    yaxis: {...axis, ...layout.yaxis},
  }, {responsive: true, displaylogo: false});
};

const rankingNames = rows => distinct(rows.map(row => row.ranking).filter(isDefined));
const sortByWindow = rows => rows.toSorted((a, b) => a.rank_hi - b.rank_hi || a.rank_lo - b.rank_lo);
const isTop = row => row.rank_lo === 0;

/** Return the distance from an estimate to one end of its interval, low or high. */
const distanceToEnd = (row, name, side) => {
  const end = row[`${name}_${side}`];
  return isDefined(end) ? Math.abs(end - row[name]) : null;
};

const hoverText = (row, name) => {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  return escapeLabel(formatValue(row[name]) + (isDefined(low) ? ` [${formatValue(low)}, ${formatValue(high)}]` : ""));
};

/** Build error bars for rows that are each `repeat` points of a trace; point number `at` of each has the bar. */
const errorBars = (rows, name, repeat = 1, at = 0) => {
  const distances = side => rows.flatMap(row => Array(repeat).fill(null).with(at, distanceToEnd(row, name, side)));
  const look = {thickness: 1.2, width: 3};
  return {type: "data", symmetric: false, array: distances("high"), arrayminus: distances("low"), ...look};
};

/** Build a trace for windows that do not begin at rank 0: a line over its ranks, with the interval in the middle. */
const windowTraces = (rows, name, look) => {
  const windows = rows.filter(row => !isTop(row) && isDefined(row[name]));
  const label = row => `ranks ${escapeLabel(row.rank_lo)} to ${escapeLabel(row.rank_hi)}: ${hoverText(row, name)}`;
  return windows.length ? [{
    x: windows.flatMap(row => [row.rank_lo, (row.rank_lo + row.rank_hi) / 2, row.rank_hi, null]),
    y: windows.flatMap(row => [row[name], row[name], row[name], null]),
    text: windows.flatMap(row => Array(4).fill(label(row))),
    hovertemplate: "%{text}", mode: "lines", error_y: errorBars(windows, name, 4, 1), ...look,
  }] : [];
};

/** Draw the mean score against k: each ranking with its interval, random controls in gray, unpatched models dashed. */
const drawMean = (rows, unpatched, scoreName) => {
  const end = Math.max(1, ...rows.map(row => row.rank_hi));
  const traces = unpatched.map(({label, row}, at) => ({
    x: [0, end], y: [row.mean, row.mean], mode: "lines", name: escapeLabel(label), text: hoverText(row, "mean"),
    hovertemplate: "%{text}", line: {color: cssColor("ink"), width: 1.5, dash: at ? "dot" : "dash"},
  }));
  const random = {name: "random controls", legendgroup: "controls", line: {color: cssColor("control"), width: 1}};
  for (const [at, ranking] of rankingNames(rows).entries()) {
    const rankingRows = sortByWindow(rows.filter(row => row.ranking === ranking && isDefined(row.mean)));
    for (const seed of distinct(rankingRows.map(row => row.control_seed).filter(isDefined))) {
      const control = rankingRows.filter(row => row.control_seed === seed), top = control.filter(isTop);
      if (top.length) traces.push({
        x: top.map(row => row.rank_hi), y: top.map(row => row.mean),
        text: top.map(row => `${hoverText(row, "mean")}, seed ${escapeLabel(seed)}`),
        hovertemplate: "k %{x}: %{text}", mode: "lines", ...random,
      });
      traces.push(...windowTraces(control, "mean", {...random, error_y: {}}));
    }
    const neurons = rankingRows.filter(row => !isDefined(row.control_seed));
    const top = neurons.filter(isTop);
    const band = top.filter(row => isDefined(row.mean_low));
    traces.push({
      x: [...band, ...band.toReversed()].map(row => row.rank_hi),
      y: [...band.map(row => row.mean_low), ...band.toReversed().map(row => row.mean_high)],
      fill: "toself", fillcolor: translucent(rankingColor(at)), line: {width: 0}, mode: "lines", hoverinfo: "skip",
      legendgroup: ranking, showlegend: false,
    }, {
      x: top.map(row => row.rank_hi), y: top.map(row => row.mean), text: top.map(row => hoverText(row, "mean")),
      hovertemplate: "k %{x}: %{text}", mode: "lines+markers", name: escapeLabel(ranking), legendgroup: ranking,
      line: {color: rankingColor(at), width: 2}, marker: {size: 6},
    });
    const line = {color: rankingColor(at), width: 3};
    traces.push(...windowTraces(neurons, "mean", {name: escapeLabel(`${ranking}, windows`), line}));
  }
  traces.filter(trace => trace.legendgroup === "controls").forEach((trace, i) => trace.showlegend = i === 0);
  const yaxis = {title: {text: escapeLabel(`mean ${scoreName}`)}};
  drawPlot("plot-mean", traces, {xaxis: {title: {text: "patched neurons (k)"}}, yaxis},
    `Mean score against k for ${rankingNames(rows).join(", ") || "no ranking"}; the table of rows has the figures`);
};

/** Draw the causal effect and the net effect against k, with their intervals. */
const drawEffect = rows => {
  const traces = [];
  for (const [at, ranking] of rankingNames(rows).entries()) {
    const neurons = sortByWindow(rows.filter(row => row.ranking === ranking && !isDefined(row.control_seed)));
    for (const [name, dash, symbol] of [["effect", "solid", "circle"], ["net_effect", "dot", "circle-open"]]) {
      const top = neurons.filter(row => isTop(row) && isDefined(row[name]));
      const label = name === "net_effect" ? `${ranking}, net` : ranking;
      if (top.length) traces.push({
        x: top.map(row => row.rank_hi), y: top.map(row => row[name]), text: top.map(row => hoverText(row, name)),
        hovertemplate: "k %{x}: %{text}", mode: "lines+markers", name: escapeLabel(label),
        line: {color: rankingColor(at), width: 2, dash}, marker: {symbol, size: 8},
        error_y: errorBars(top, name),
      });
      const line = {color: rankingColor(at), width: 3, dash};
      traces.push(...windowTraces(neurons, name, {name: escapeLabel(`${label}, windows`), line}));
    }
  }
  byId("effects").hidden = !traces.length;
  if (traces.length) drawPlot("plot-effect", traces, {
    xaxis: {title: {text: "patched neurons (k)"}},
    yaxis: {title: {text: "effect"}, tickformat: ".0%"},
    shapes: [0, 1].map(y => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: {color: cssColor("faint"), width: 1},
    })),
  }, "Causal effect and net effect against k; the table of rows has the figures");
};

/** Draw a heat map of layers and rank bins for each ranking. */
const drawMaps = maps => {
  const scale = [[0, cssColor("panel")], [1, cssColor("accent")]];
  for (const [at, [ranking, map]] of Object.entries(maps).entries()) {
    drawPlot(`map-${at}`, [{
      type: "heatmap", z: map.values, colorscale: scale, xgap: map.bins > 60 ? 0 : 1, ygap: map.layers > 40 ? 0 : 1,
      hovertemplate: "layer %{y}, bin %{x}: %{z:.3g}<extra></extra>", colorbar: {thickness: 12, outlinewidth: 0},
    }], {
      xaxis: {title: {text: "rank bin, best first"}, showgrid: false},
      yaxis: {title: {text: "layer"}, showgrid: false},
    }, `Heat map of ${ranking}: ${map.layers} layers, ${map.bins} rank bins`);
  }
};
