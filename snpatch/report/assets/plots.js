// Plots of one judge, donor, set and strength, in the colors of the page.

const PALETTE = {
  light: ["#0b62a8", "#c4501b", "#1a7f4b", "#8a3ea8", "#946000", "#b0285a"],
  dark: ["#6cb6ff", "#ff9b6a", "#5fd08f", "#d29bf0", "#e5b94e", "#ff8fb3"],
};

const isDark = () => byId("theme").getAttribute("aria-pressed") === "true";
const rankingColor = at => PALETTE[isDark() ? "dark" : "light"].at(at % 6);

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
  const axes = Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name));
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
    ...Object.fromEntries(axes.map(([name, own]) => [name, {...axis, ...own}])),
  }, {responsive: true, displaylogo: false});
};

const rankingNames = rows => distinct(rows.map(row => row.ranking).filter(isDefined));
const sortByWindow = rows => rows.toSorted((a, b) => a.rank_hi - b.rank_hi || a.rank_lo - b.rank_lo);
const isTop = row => row.rank_lo === 0;
const isControl = row => isDefined(row.control);
/** Names of the kinds of controls that are not plain random ones. */
const CONTROL_NAMES = {
  magnitude: "largest activations", matched: "matched activations", equal_energy: "random, equal energy",
};
const CONTROL_DASHES = {magnitude: "dash", matched: "dashdot", equal_energy: "dot"};
const controlName = row => CONTROL_NAMES[row.control] ?? "random controls";
const windowLabel = row => row.rank_lo ? `ranks ${row.rank_lo} to ${row.rank_hi}` : `k = ${row.rank_hi}`;
const isSameWindow = (one, other) => one?.rank_lo === other?.rank_lo && one?.rank_hi === other?.rank_hi;
const describeWindow = row => `${windowLabel(row)} (${formatPercent(row.neuron_fraction, 1)} of the neurons)`;

const SCALES = ["share of neurons", "log k"];

/** Estimates that the figure can show. levels: those of the unpatched recipient and donor, if not their scores. */
const ESTIMATES = {
  mean: {label: "mean score", format: formatValue},
  effect: {label: "effect", format: formatPercent, levels: [0, 1], tickformat: ".0%"},
  net_effect: {label: "net effect", format: formatPercent, levels: [], tickformat: ".0%"},
  effect_coherent: {label: "effect, without broken texts", format: formatPercent, levels: [0, 1], tickformat: ".0%"},
  broken: {label: "broken texts", format: formatPercent, levels: [], tickformat: ".0%"},
  harmless_refused: {label: "harmless prompts refused", format: formatPercent, tickformat: ".0%"},
};

/** Return the distance from an estimate to one end of its interval, low or high. */
const distanceToEnd = (row, name, side) => {
  const end = row[`${name}_${side}`];
  return isDefined(end) ? Math.abs(end - row[name]) : null;
};

/** Build error bars for rows that are each `repeat` points of a trace; point number `at` of each has the bar. */
const errorBars = (rows, name, repeat = 1, at = 0) => {
  const distances = side => rows.flatMap(row => Array(repeat).fill(null).with(at, distanceToEnd(row, name, side)));
  const look = {thickness: 1.2, width: rows.length > 40 ? 0 : 3};
  return {type: "data", symmetric: false, array: distances("high"), arrayminus: distances("low"), ...look};
};

/** Build the x axis: ranks as a share of all neurons, or k: linear up to the smallest, so that 0 has a place, then log. */
const createRankAxis = (rows, isLog) => {
  if (!isLog) {
    const {rank_lo = 0, rank_hi = 1, neuron_fraction = 0} = rows.find(row => row.neuron_fraction) ?? {};
    const toX = rank => rank * neuron_fraction / (rank_hi - rank_lo);
    return {toX, axis: {title: {text: "patched neurons, share of all"}, tickformat: "~%"}};
  }
  const ranks = distinct(rows.flatMap(row => [row.rank_lo, row.rank_hi])).filter(Boolean).sort((a, b) => a - b);
  const [smallest, largest] = [ranks[0] ?? 1, ranks.at(-1) ?? 1];
  const toX = rank => Math.asinh(rank / smallest);
  const steps = largest > 200 * smallest ? [1] : [1, 2, 5];
  const round = [...Array(16).keys()].flatMap(power => steps.map(step => step * 10 ** power));
  const ticks = [0, smallest, ...round.filter(tick => tick > 1.4 * smallest && tick <= largest)];
  const axis = {title: {text: "patched neurons (k, log scale)"}, tickvals: ticks.map(toX), ticktext: ticks.map(String)};
  return {toX, axis};
};

/** Build a panel's traces of an estimate: rankings with intervals, controls in gray, unpatched models dashed. */
const panelTraces = ({recipient, donor, rows, unpatched}, rankings, name, toX) => {
  const {format, levels} = ESTIMATES[name];
  const hover = rows => ({
    text: rows.map(row => [
      isDefined(row.ranking) ? describeWindow(row) : row.recipient, isControl(row) && controlName(row),
      isDefined(row.control_seed) && `seed ${row.control_seed}`,
      `${format(row[name])} ${formatInterval(row, name, format)}`,
    ].filter(Boolean).map(escapeLabel).join("<br>")),
    customdata: rows.map(row => ({recipient, row})), hovertemplate: "%{text}<extra></extra>", mode: "lines",
  });
  const topTrace = rows =>
    ({x: rows.map(row => toX(row.rank_hi)), y: rows.map(row => row[name]), ...hover(rows)});
  /** Build a trace for windows that do not begin at rank 0: a line over the ranks of each. */
  const windowTrace = rows => ({
    x: rows.flatMap(row => [...[row.rank_lo, (row.rank_lo + row.rank_hi) / 2, row.rank_hi].map(toX), null]),
    y: rows.flatMap(row => [row[name], row[name], row[name], null]),
    ...hover(rows.flatMap(row => Array(4).fill(row))),
  });
  const traces = [], ranks = distinct([0, ...rows.flatMap(row => [row.rank_lo, row.rank_hi])]).sort((a, b) => a - b);
  for (const [at, row] of unpatched.entries()) {
    const level = levels ? levels[at] : row?.[name];
    if (row && isDefined(level)) traces.push({
      ...hover(ranks.map(() => ({...row, [name]: level}))), x: ranks.map(toX), y: ranks.map(() => level),
      name: at ? `${donor}, donor, unpatched` : "recipient, unpatched",
      line: {color: cssColor("ink"), width: 1.5, dash: at ? "dot" : "dash"},
    });
  }
  for (const [at, ranking] of rankings.entries()) {
    const rankingRows = sortByWindow(rows.filter(row => row.ranking === ranking && isDefined(row[name])));
    const drawKey = row => JSON.stringify([row.control, row.control_seed]);
    for (const draw of distinct(rankingRows.filter(isControl).map(drawKey))) {
      const drawRows = rankingRows.filter(row => isControl(row) && drawKey(row) === draw);
      const name = controlName(drawRows[0]), dash = CONTROL_DASHES[drawRows[0].control] ?? "solid";
      const look = {name, line: {color: cssColor("control"), width: dash === "solid" ? 1 : 1.5, dash}};
      traces.push({...topTrace(drawRows.filter(isTop)), ...look});
      traces.push({...windowTrace(drawRows.filter(row => !isTop(row))), ...look});
    }
    const neurons = rankingRows.filter(row => !isControl(row));
    const top = neurons.filter(isTop), windows = neurons.filter(row => !isTop(row)), color = rankingColor(at);
    traces.push({
      ...topTrace(top), name: ranking, mode: "lines+markers", error_y: errorBars(top, name), line: {color, width: 2},
      marker: {size: 6},
    }, {
      ...windowTrace(windows), name: `${ranking}, windows`, error_y: errorBars(windows, name, 4, 1),
      line: {color, width: 3},
    });
  }
  return traces.filter(trace => trace.x.length);
};

/**
 * Draw the figure of a sweep: a panel for each recipient, side by side, on equal axes.
 *
 * panels: recipient, donor, rows, and unpatched: the rows of recipient and donor. estimate: a key of ESTIMATES.
 * scoreName: name of the mean score. marked: window that a vertical line marks. columns: panels in a row.
 * open(recipient, row): called when a point is clicked.
 */
const drawFigure = (panels, {estimate, isLog, scoreName, marked, columns, open}) => {
  const rows = panels.flatMap(panel => panel.rows), rankings = rankingNames(rows);
  const {toX, axis} = createRankAxis(rows, isLog);
  const axisNumber = at => at ? at + 1 : "";
  const places = panels.map((_, at) => [at % columns, Math.floor(at / columns)].map(axisNumber));
  const legend = new Set();
  const traces = panels.flatMap((panel, at) => panelTraces(panel, rankings, estimate, toX).map(trace => {
    const isFirst = !legend.has(trace.name), [x, y] = places[at];
    legend.add(trace.name);
    const name = escapeLabel(trace.name);
    return {...trace, name, legendgroup: trace.name, showlegend: isFirst, xaxis: `x${x}`, yaxis: `y${y}`};
  }));
  const label = estimate === "mean" ? `mean ${scoreName}` : ESTIMATES[estimate].label;
  const matching = letter => number => [`${letter}axis${number}`, {
    ...letter === "x" ? axis : {title: {text: escapeLabel(label)}, tickformat: ESTIMATES[estimate].tickformat},
    ...number && {matches: letter},
  }];
  const columnNumbers = distinct(places.map(([x]) => x)), rowNumbers = distinct(places.map(([, y]) => y));
  byId("plot-curve").style.height = `${rowNumbers.length > 1 ? 60 + 300 * rowNumbers.length : 400}px`;
  drawPlot("plot-curve", traces, {
    margin: {l: 56, r: 12, t: 32, b: 48},
    grid: {rows: rowNumbers.length, columns: columnNumbers.length, xgap: 0.06, ygap: 0.16},
    ...Object.fromEntries([...columnNumbers.map(matching("x")), ...rowNumbers.map(matching("y"))]),
    annotations: panels.map(({recipient}, at) => ({
      text: escapeLabel(recipient), showarrow: false,
      xref: `x${places[at][0]} domain`, yref: `y${places[at][1]} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom",
    })),
    shapes: marked ? columnNumbers.map(x => ({
      type: "line", layer: "below", xref: `x${x}`, yref: "paper", y0: 0, y1: 1,
      ...Object.fromEntries(["x0", "x1"].map(end => [end, toX((marked.rank_hi + (marked.rank_lo || marked.rank_hi)) / 2)])),
      line: {color: cssColor("faint"), width: 1},
    })) : [],
  }, `${label} against k for ${panels.map(panel => panel.recipient).join(", ")}; the table of rows has the figures`);
  byId("plot-curve").removeAllListeners("plotly_click");
  byId("plot-curve").on("plotly_click", ({points: [{customdata}]}) => open(customdata.recipient, customdata.row));
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
