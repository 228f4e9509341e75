// The page: selectors, sections, and the light and dark themes.

const data = JSON.parse(byId("data").textContent);
const completions = await openCompletions();

const rowsAndPoints = [...data.rows, ...completions.points];
const valuesOf = name => distinct(rowsAndPoints.map(row => row[name]).filter(isDefined));
const patched = rowsAndPoints.filter(row => isDefined(row.ranking));
const recipients = distinct(patched.map(row => row.recipient));
const judges = distinct([...valuesOf("judge"), ...completions.records.flatMap(record => Object.keys(record.scores))]);
const judge = fillSelect(byId("judge"), judges);
const recipient = fillSelect(byId("recipient"), recipients.length ? recipients : valuesOf("recipient"));
const set = fillSelect(byId("set"), valuesOf("set"));
const strengths = distinct(patched.map(row => row.strength)).sort((a, b) => a - b);
const strength = fillSelect(byId("strength"), strengths,
  {label: value => formatValue(value, true), selected: strengths.indexOf(1)});
const selection = () => ({judge: judge(), recipient: recipient(), set: set(), strength: strength()});
byId("selection").hidden = [...byId("selection").querySelectorAll("label")].every(label => label.hidden);

const showRows = () => {
  const {judge, recipient, set, strength} = selection();
  const rows = data.rows.filter(row => matchesFields({judge, set}, row));
  const patchedRows = rows.filter(row => isDefined(row.ranking) && matchesFields({recipient, strength}, row));
  const findUnpatched = name => rows.find(row => !isDefined(row.ranking) && row.recipient === name);
  const donor = patchedRows[0]?.donor;
  const unpatched = [[recipient, recipient], [donor, `${donor}, donor`]]
    .map(([name, label]) => ({label: `${label}, unpatched`, row: findUnpatched(name)})).filter(({row}) => row);
  byId("curve").hidden = !patchedRows.length && !unpatched.length;
  if (!byId("curve").hidden) drawMean(patchedRows, unpatched, data.score_names[judge] ?? judge);
  drawEffect(patchedRows);
  const tableRows = [...unpatched.map(({row}) => row), ...patchedRows];
  const columns = Object.keys(tableRows[0] ?? {}).filter(name => !["judge", "set"].includes(name));
  byId("table").hidden = !tableRows.length;
  const cells = tableRows.map(row => columns.map(name => row[name]));
  byId("rows").replaceChildren(sortableTable(columns, cells, `${judge}, ${recipient}, ${set}`));
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
byId("provenance").append(...Object.entries(data.provenance).map(entry => dataTree(...entry)));
byId("origin").hidden = !Object.keys(data.provenance).length;
byId("maps").hidden = !Object.keys(data.maps).length;
byId("maps").querySelector(".maps").append(...Object.keys(data.maps).map((ranking, at) =>
  element("figure", {class: "figure"}, element("figcaption", {}, ranking),
    element("div", {class: "plot", id: `map-${at}`, role: "img"}))));
byId("completions").hidden = !completions.cases.length;

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = dark => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
  showRows();
  drawMaps(data.maps);
};
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches));
byId("theme").addEventListener("click", () => setTheme(!isDark()));
setTheme(prefersDark.matches);

const showCompletions = createBrowser(completions, selection);
for (const id of ["judge", "recipient", "set", "strength"]) byId(id).addEventListener("change", () => {
  showRows();
  showCompletions();
});
byId("sections").append(...[...document.querySelectorAll("main section[id]:not([hidden]) > h2")].map(heading =>
  element("a", {href: `#${heading.parentElement.id}`}, heading.textContent)));
await showCompletions();
document.documentElement.dataset.ready = "";
