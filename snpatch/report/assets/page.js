// The page: what is chosen, its sections, and light and dark.

const data = JSON.parse(byId("data").textContent);
const texts = await openTexts();

const all = name => distinct([...data.rows, ...texts.points].map(one => one[name]).filter(isDefined));
const patched = [...data.rows, ...texts.points].filter(row => isDefined(row.ranking));
const recipients = distinct(patched.map(row => row.recipient));
const judges = distinct([...all("judge"), ...texts.texts.flatMap(text => Object.keys(text.scores))]);
const judge = choice(byId("judge"), judges);
const recipient = choice(byId("recipient"), recipients.length ? recipients : all("recipient"));
const set = choice(byId("set"), all("set"));
const strengths = distinct(patched.map(row => row.strength)).sort((one, other) => one - other);
const strength = choice(byId("strength"), strengths, {label: value => cell(value, true), chosen: strengths.indexOf(1)});
const chosen = () => ({judge: judge(), recipient: recipient(), set: set(), strength: strength()});
byId("chosen").hidden = [...byId("chosen").querySelectorAll("label")].every(label => label.hidden);

const showRows = () => {
  const {judge, recipient, set, strength} = chosen();
  const rows = data.rows.filter(row => isSame({judge, set}, row));
  const mine = rows.filter(row => isDefined(row.ranking) && isSame({recipient, strength}, row));
  const plain = name => rows.find(row => !isDefined(row.ranking) && row.recipient === name);
  const donor = mine[0]?.donor;
  const unpatched = [{label: recipient, row: plain(recipient)}, {label: `${donor}, donor`, row: plain(donor)}]
    .filter(({row}) => row).map(({label, row}) => ({label: `${label}, unpatched`, row}));
  byId("curve").hidden = !mine.length && !unpatched.length;
  if (!byId("curve").hidden) drawMean(mine, unpatched);
  drawEffect(mine);
  const listed = [...unpatched.map(({row}) => row), ...mine];
  const columns = Object.keys(listed[0] ?? {}).filter(name => !["judge", "set"].includes(name));
  byId("table").hidden = !listed.length;
  const cells = listed.map(row => columns.map(name => row[name]));
  byId("rows").replaceChildren(table(columns, cells, `${judge}, ${recipient}, ${set}`));
};

const showReport = ({name, headline = [], tables = {}, images = []}) => element("section", {id: `report-${name}`},
  element("h2", {}, name),
  element("ul", {}, ...headline.map(sentence => element("li", {}, sentence))),
  ...Object.entries(tables).map(([title, {columns, rows}]) => table(columns, rows, title)),
  element("div", {class: "images"}, ...images.map(src => element("img", {src, alt: `Plot of ${name}`}))));

byId("unfinished").textContent = data.unfinished ?? "";
byId("unfinished").hidden = !data.unfinished;
byId("headline").append(...data.headline.map(sentence => element("li", {}, sentence)));
byId("command").textContent = data.command;
byId("made").hidden = !data.command;
byId("reports").append(...data.reports.map(showReport));
byId("provenance").append(...Object.entries(data.provenance).map(entry => tree(...entry)));
byId("origin").hidden = !Object.keys(data.provenance).length;
byId("maps").hidden = !Object.keys(data.maps).length;
byId("maps").querySelector(".maps").append(...Object.keys(data.maps).map((ranking, at) =>
  element("figure", {class: "figure"}, element("figcaption", {}, ranking),
    element("div", {class: "plot", id: `map-${at}`, role: "img"}))));
byId("texts").hidden = !texts.cases.length;

const darkness = matchMedia("(prefers-color-scheme: dark)");
const paint = dark => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
  showRows();
  drawMaps(data.maps);
};
darkness.addEventListener("change", () => paint(darkness.matches));
byId("theme").addEventListener("click", () => paint(!isDark()));
paint(darkness.matches);

const showTexts = browse(texts, chosen);
for (const id of ["judge", "recipient", "set", "strength"]) byId(id).addEventListener("change", () => {
  showRows();
  showTexts();
});
byId("sections").append(...[...document.querySelectorAll("main section[id]:not([hidden]) > h2")].map(heading =>
  element("a", {href: `#${heading.parentElement.id}`}, heading.textContent)));
await showTexts();
document.documentElement.dataset.ready = "";
