// Elements and choices. Whatever comes from a model is given to append() as a string, which makes text and never HTML.

const byId = id => document.getElementById(id);

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

const distinct = values => [...new Set(values)];
const isDefined = value => value !== null && value !== undefined;
const isSame = (one, other) => Object.keys(one).every(name => one[name] === other[name]);

/** How a value reads in a cell: numbers short, what is undefined empty. isCount: whole numbers as they are. */
const cell = (value, isCount = false) => {
  if (!isDefined(value)) return "";
  if (typeof value === "object") return JSON.stringify(value);
  if (typeof value !== "number" || isCount && Number.isInteger(value)) return String(value);
  if (Math.abs(value) >= 1e4) return value.toPrecision(3);
  return value && Math.abs(value) < 0.01 ? String(Number(value.toPrecision(3))) : value.toFixed(2);
};

const signed = value => (value > 0 ? "+" : "") + cell(value);

/** A select over any values, hidden where there is nothing to choose. Returns what is chosen. */
const choice = (select, values, {label = String, chosen = 0, always = false} = {}) => {
  select.replaceChildren(...values.map(value => element("option", {}, label(value))));
  select.selectedIndex = values.length ? Math.max(0, chosen) : -1;
  select.closest("label").hidden = values.length < 2 && !always;
  return () => values[select.selectedIndex];
};

/** A table that a click on a heading sorts. */
const table = (columns, rows, title) => {
  const isCount = columns.map((_, at) => rows.every(row => typeof row[at] !== "number" || Number.isInteger(row[at])));
  const kind = value => typeof value === "number" ? {class: "number"} : {};
  const body = element("tbody");
  const fill = sorted => body.replaceChildren(...sorted.map(row => element("tr", {}, ...row.map((value, at) =>
    element("td", kind(value), cell(value, isCount[at]))))));
  const headings = columns.map((column, at) => {
    const button = element("button", {type: "button"}, column);
    const heading = element("th", {scope: "col", ...kind(rows.find(row => isDefined(row[at]))?.[at])}, button);
    button.addEventListener("click", () => {
      const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const up = order === "ascending" ? 1 : -1;
      fill(rows.toSorted((one, other) => compared(one[at], other[at], up)));
    });
    return heading;
  });
  fill(rows);
  return element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": title},
    element("table", {}, element("caption", {}, title), element("thead", {}, element("tr", {}, ...headings)), body));
};

/** Of two cells; undefined ones come last in either direction. */
const compared = (one, other, up) => {
  if (!isDefined(one) || !isDefined(other)) return isDefined(other) - isDefined(one);
  const isNumeric = typeof one === "number" && typeof other === "number";
  return up * (isNumeric ? one - other : String(one).localeCompare(String(other), undefined, {numeric: true}));
};

/** Nested data as lists that open. */
const tree = (name, value) => {
  const label = element("span", {class: "name"}, `${name}: `);
  const isLeaf = one => one === null || typeof one !== "object";
  if (isLeaf(value)) return element("div", {}, label, JSON.stringify(value));
  if (Array.isArray(value) && value.every(isLeaf)) {
    return element("div", {}, label, value.map(one => JSON.stringify(one)).join(", "));
  }
  const entries = Object.entries(value);
  const size = `${entries.length} ${Array.isArray(value) ? "items" : "fields"}`;
  return element("details", {}, element("summary", {}, label, size),
    element("div", {class: "tree"}, ...entries.map(entry => tree(...entry))));
};
