// DOM helpers. Text from a model is only passed to append() as a string, which creates text nodes and never HTML.

const byId = id => document.getElementById(id);

const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

const distinct = values => [...new Set(values)];
const isDefined = value => value !== null && value !== undefined;
/** Return true if the row has all values of the wanted fields. */
const matchesFields = (wanted, row) => Object.keys(wanted).every(name => wanted[name] === row[name]);

/** Format a value for a cell: numbers short, undefined empty. isCount: integers in full. */
const formatValue = (value, isCount = false) => {
  if (!isDefined(value)) return "";
  if (typeof value === "object") return JSON.stringify(value);
  if (typeof value !== "number" || isCount && Number.isInteger(value)) return String(value);
  if (Math.abs(value) >= 1e4) return value.toPrecision(3);
  return value && Math.abs(value) < 0.01 ? String(Number(value.toPrecision(3))) : value.toFixed(2);
};

/** Format a fraction as a percentage. */
const formatPercent = (value, digits = 0) =>
  isDefined(value) ? `${(Number((100 * value).toFixed(digits)) + 0).toFixed(digits)}%` : "undefined"; // + 0: no -0%

/** Return "[low .. high]" from a row's columns; empty if the interval is undefined. */
const formatInterval = (row, name, format = formatValue) => {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  return isDefined(low) && isDefined(high) ? `[${format(low)} .. ${format(high)}]` : "";
};

/** Return "smallest .. largest" of several values, or one value if both are formatted alike. */
const formatRange = (values, format) =>
  distinct([Math.min(...values), Math.max(...values)].map(value => format(value))).join(" .. ");

const formatSigned = value => (value > 0 ? "+" : "") + formatValue(value);

/** Fill a select element with values; hide it if there is no choice. Return a getter of the selected value. */
const fillSelect = (select, values, {label = String, selected = 0, alwaysVisible = false} = {}) => {
  select.replaceChildren(...values.map(value => element("option", {}, label(value))));
  select.selectedIndex = values.length ? Math.max(0, selected) : -1;
  select.closest("label").hidden = values.length < 2 && !alwaysVisible;
  const selectedValue = () => values[select.selectedIndex];
  selectedValue.choose = value => select.selectedIndex = Math.max(0, values.indexOf(value));
  return selectedValue;
};

/** Create a table that sorts by a column when its heading is clicked. */
const sortableTable = (columns, rows, title) => {
  const isCount = columns.map((_, column) =>
    rows.every(row => typeof row[column] !== "number" || Number.isInteger(row[column])));
  const cellClass = value => typeof value === "number" ? {class: "number"} : {};
  const body = element("tbody");
  const showRows = sorted => body.replaceChildren(...sorted.map(row => element("tr", {}, ...row.map((value, column) =>
    element("td", cellClass(value), formatValue(value, isCount[column]))))));
  const headings = columns.map((name, column) => {
    const button = element("button", {type: "button"}, name);
    const example = rows.find(row => isDefined(row[column]))?.[column];
    const heading = element("th", {scope: "col", ...cellClass(example)}, button);
    button.addEventListener("click", () => {
      const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      showRows(rows.toSorted((a, b) => compareCells(a[column], b[column], sign)));
    });
    return heading;
  });
  showRows(rows);
  return element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": title},
    element("table", {}, element("caption", {}, title), element("thead", {}, element("tr", {}, ...headings)), body));
};

/** Compare two cells. sign: 1 for ascending, -1 for descending; undefined cells come last in both. */
const compareCells = (a, b, sign) => {
  if (!isDefined(a) || !isDefined(b)) return isDefined(b) - isDefined(a);
  const isNumeric = typeof a === "number" && typeof b === "number";
  return sign * (isNumeric ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true}));
};

/** Create nested, collapsible lists from nested data. */
const dataTree = (name, value) => {
  const label = element("span", {class: "name"}, `${name}: `);
  const isLeaf = item => item === null || typeof item !== "object";
  if (isLeaf(value)) return element("div", {}, label, JSON.stringify(value));
  if (Array.isArray(value) && value.every(isLeaf)) {
    return element("div", {}, label, value.map(item => JSON.stringify(item)).join(", "));
  }
  const entries = Object.entries(value);
  const size = `${entries.length} ${Array.isArray(value) ? "items" : "fields"}`;
  return element("details", {}, element("summary", {}, label, size),
    element("div", {class: "tree"}, ...entries.map(entry => dataTree(...entry))));
};
