// The page: selectors, sections, and the light and dark themes.

const data = JSON.parse(byId("data").textContent);
const completions = await openCompletions();

const HEADLINE_FRACTION = 20000 / 352256; // the paper's k in Llama-2-7B, as a fraction of all neurons

const rowsAndPoints = [...data.rows, ...completions.points];
const valuesOf = name => distinct(rowsAndPoints.map(row => row[name]).filter(isDefined));
const patched = rowsAndPoints.filter(row => isDefined(row.ranking));
const judges = distinct([...valuesOf("judge"), ...completions.records.flatMap(record => Object.keys(record.scores))]);
const judge = fillSelect(byId("judge"), judges);
const donor = fillSelect(byId("donor"), valuesOf("donor"));
const set = fillSelect(byId("set"), valuesOf("set"));
const strengths = distinct(patched.map(row => row.strength)).sort((a, b) => a - b);
const strength = fillSelect(byId("strength"), strengths,
  {label: value => formatValue(value, true), selected: strengths.indexOf(1)});
const estimate = fillSelect(byId("estimate"),
  Object.keys(ESTIMATES).filter(name => name === "mean" || data.rows.some(row => isDefined(row[name]))),
  {label: name => ESTIMATES[name].label});
const scale = fillSelect(byId("scale"), data.rows.some(row => isDefined(row.ranking)) ? SCALES : []);
let panels = [], headlineWindow = () => null, recipient = () => null;
const selection = () => ({
  judge: judge(), donor: donor(), recipient: recipient(), set: set(), strength: strength(), window: headlineWindow(),
});

/** Fill the selector of the compared completions' recipient: those that are patched from the donor. */
const fillRecipients = () => {
  const previous = recipient(), names = distinct(patched.filter(row => row.donor === donor()).map(row => row.recipient));
  recipient = fillSelect(byId("recipient"), names.length ? names : valuesOf("recipient"));
  recipient.choose(previous);
};

/** Fill the selector of the cards' window. The initial one is the nearest to the paper's, whatever the results are. */
const fillWindows = rows => {
  const windows = [...new Map(rows.toReversed().map(row => [windowLabel(row), row])).values()]
    .sort((a, b) => a.rank_lo - b.rank_lo || a.rank_hi - b.rank_hi);
  const distance = row => isTop(row) ? Math.abs(row.neuron_fraction - HEADLINE_FRACTION) : Infinity;
  const initial = windows.toSorted((a, b) => distance(a) - distance(b))[0];
  const previous = windows.find(row => isSameWindow(row, headlineWindow()));
  headlineWindow =
    fillSelect(byId("window"), windows, {label: describeWindow, selected: windows.indexOf(previous ?? initial)});
};

/** Show the completions of a row next to those of the recipient. */
const openTexts = (name, row) => {
  recipient.choose(name);
  return browser.open(row);
};

/** Create a button that opens a row's completions, or only its content if the page has none. */
const completionsButton = (recipient, row, ...content) => {
  if (!completions.points.some(point => isSamePoint(point, row))) return element("div", {}, ...content);
  const button = element("button", {type: "button", title: "Show the completions"}, ...content);
  button.addEventListener("click", () => openTexts(recipient, row));
  return button;
};

/** Create the part of a card that states a ranking's effect, those of its controls, and its side effects. */
const effectButton = (row, controls, name) => {
  const lines = distinct(["random controls", ...controls.map(controlName)]).map(kind => {
    const ofKind = controls.filter(control => controlName(control) === kind);
    const effects = ofKind.map(control => control.effect).filter(isDefined);
    return `${kind}: ${effects.length ? formatRange(effects, formatPercent) : ofKind.length ? "undefined" : "none"}`;
  });
  if (isDefined(row.broken)) lines.push(`broken texts: ${formatPercent(row.broken)}`);
  if (isDefined(row.harmless_refused)) lines.push(`harmless prompts refused: ${formatPercent(row.harmless_refused)}`);
  return completionsButton(row.recipient, row,
    element("strong", {}, formatPercent(row.effect)), ` ${formatInterval(row, "effect", formatPercent)}`,
    !isDefined(row.effect) && isDefined(row.gap_t) ?
      element("div", {}, `gap not established: t = ${row.gap_t.toFixed(1)}`) : "",
    element("div", {}, `effect of ${name}`), ...lines.map(line => element("div", {}, line)),
    row.failed ? element("div", {}, `on ${row.state}`) : "");
};

/** Create a recipient's card: the effect of each ranking at the selected window, and the gap to the donor. */
const headlineCard = ({recipient, donor, rows, unpatched}) => {
  const windowRows = rows.filter(row => isSameWindow(row, headlineWindow())), rankings = rankingNames(windowRows);
  const effects = rankings.map(ranking => {
    const rankingRows = windowRows.filter(row => row.ranking === ranking);
    const row = rankingRows.find(row => !isControl(row));
    return row && effectButton(row, rankingRows.filter(isControl), `${windowLabel(row)}, ${ranking}`);
  });
  const [before, after] = unpatched.map(row => row?.mean);
  const gap = isDefined(before) && isDefined(after) ? formatSigned(after - before) : "undefined";
  return element("section", {class: "card headline"},
    element("h3", {}, `${recipient}, patched from ${donor}`), ...effects.filter(isDefined),
    element("div", {class: "gap"}, element("div", {}, `gap of the mean ${judge()}: ${gap}`),
      ...unpatched.filter(isDefined).map(row => completionsButton(recipient, row,
        `${row.recipient}: ${formatValue(row.mean) || "undefined"} ${formatInterval(row, "mean")}`))));
};

const showFigure = () => {
  if (panels.length) drawFigure(panels, {
    estimate: estimate(), isLog: scale() === "log k", scoreName: data.score_names[judge()] ?? judge(),
    marked: headlineWindow(), columns: isNarrow.matches ? 1 : Math.min(panels.length, 4), open: openTexts,
  });
};

const showHeadline = () => {
  byId("cards").replaceChildren(...panels.map(headlineCard));
  showFigure();
};

const showRows = () => {
  const {judge, donor, set, strength} = selection();
  const rows = data.rows.filter(row => matchesFields({judge, set}, row));
  const unpatchedRows = rows.filter(row => !isDefined(row.ranking));
  const patchedRows = rows.filter(row => isDefined(row.ranking) && matchesFields({donor, strength}, row));
  panels = distinct(patchedRows.map(row => row.recipient)).map(recipient => ({
    recipient, donor, rows: patchedRows.filter(row => row.recipient === recipient),
    unpatched: [recipient, donor].map(name => unpatchedRows.find(row => row.recipient === name)),
  }));
  byId("curve").hidden = !panels.length;
  fillWindows(patchedRows);
  showHeadline();
  const tableRows = [...unpatchedRows, ...patchedRows];
  const columns = Object.keys(tableRows[0] ?? {}).filter(name => !["judge", "set"].includes(name));
  byId("table").hidden = !tableRows.length;
  const cells = tableRows.map(row => columns.map(name => row[name]));
  byId("rows").replaceChildren(sortableTable(columns, cells, `${judge}, ${set}`));
};

const reportSection = ({name, headline = [], tables = {}, images = []}) => element("section", {id: `report-${name}`},
  element("h2", {}, name),
  element("ul", {}, ...headline.map(sentence => element("li", {}, sentence))),
  ...Object.entries(tables).map(([title, {columns, rows}]) => sortableTable(columns, rows, title)),
  element("div", {class: "images"}, ...images.map(src => element("img", {src, alt: `Plot of ${name}`}))));

byId("unfinished").textContent = data.unfinished ?? "";
byId("unfinished").hidden = !data.unfinished;
byId("headline").append(...data.headline.map(sentence => element("li", {}, sentence)));
byId("command").textContent = data.command;
byId("made").hidden = !data.command;
byId("reports").append(...data.reports.map(reportSection));
byId("notes").hidden = !data.notes.length;
byId("notes").querySelector("summary").textContent = `Remarks and failures (${data.notes.length})`;
byId("notes").querySelector("ul").append(...data.notes.map(note => element("li", {}, note)));
byId("provenance").append(...Object.entries(data.provenance).map(entry => dataTree(...entry)));
byId("origin").hidden = !Object.keys(data.provenance).length;
byId("maps").hidden = !Object.keys(data.maps).length;
byId("maps").querySelector(".maps").append(...Object.keys(data.maps).map((ranking, at) =>
  element("figure", {class: "figure"}, element("figcaption", {}, ranking),
    element("div", {class: "plot", id: `map-${at}`, role: "img"}))));
byId("completions").hidden = !completions.cases.length;

const browser = createBrowser(completions, selection);
const isNarrow = matchMedia("(max-width: 720px)");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = dark => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
  showFigure();
  drawMaps(data.maps);
};
fillRecipients();
showRows();
setTheme(prefersDark.matches);
byId("selection").hidden = [...byId("selection").querySelectorAll("label")].every(label => label.hidden);

isNarrow.addEventListener("change", showFigure);
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches));
byId("theme").addEventListener("click", () => setTheme(!isDark()));
for (const id of ["judge", "donor", "set", "strength"]) byId(id).addEventListener("change", () => {
  fillRecipients();
  showRows();
  browser.show();
});
for (const id of ["estimate", "scale"]) byId(id).addEventListener("change", showFigure);
byId("window").addEventListener("change", () => {
  showHeadline();
  browser.show({...headlineWindow(), recipient: recipient()});
});
byId("recipient").addEventListener("change", () => browser.show());
byId("sections").append(...[...document.querySelectorAll("main section[id]:not([hidden]) > h2")].map(heading =>
  element("a", {href: `#${heading.parentElement.id}`}, heading.textContent)));
await browser.show();
document.documentElement.dataset.ready = "";
