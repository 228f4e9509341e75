// The browser of texts: prompts found by words, scores and changes, and each prompt's texts side by side.

const LISTED = 50; // prompts of the list that are there at once

const once = make => {
  let made;
  return () => made ??= make();
};

const unpack = script => {
  const bytes = Uint8Array.from(atob(script.textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

/** What the page keeps of its texts. texts[i].completion is there once its piece is unpacked, see `read`. */
const openTexts = async () => {
  const [first, ...scripts] = document.querySelectorAll('script[type="application/json-gz"]');
  const {piece, cases, points, texts} = await unpack(first);
  const byCase = cases.map(() => new Map());
  texts.forEach((text, number) => byCase[text.case].set(text.point, Object.assign(text, {number})));
  const pieces = scripts.map((script, at) => once(async () =>
    (await unpack(script)).forEach((completion, i) => texts[at * piece + i].completion = completion)));
  const read = some => Promise.all(distinct(some.map(text => Math.floor(text.number / piece))).map(at => pieces[at]()));
  const lowered = once(async () => {
    await read(texts);
    const lower = texts.map(text => (text.completion ?? "").toLowerCase());
    const prompts = cases.map(one => one.prompt.toLowerCase());
    return (query, one, some) => prompts[one].includes(query)
      || some.some(point => lower[byCase[one].get(point.number)?.number]?.includes(query));
  });
  return {cases, points, texts, byCase, read, lowered};
};

const nameOf = (point, donor) => {
  if (!isDefined(point.ranking)) return `${point.recipient}, unpatched${point.recipient === donor ? ", donor" : ""}`;
  const window = point.lo ? `ranks ${point.lo} to ${point.hi}` : `k = ${point.hi}`;
  const control = isDefined(point.control_seed) ? `random control ${point.control_seed} of ` : "";
  return `${window}, ${control}${point.ranking}`;
};

/** A text with its first word marked that is not the other's; where it stops short of the other, its end is. */
const differing = (text, other) => {
  const words = string => [...string.matchAll(/\S+/g)];
  const theirs = words(other), mine = words(text);
  const at = mine.findIndex((word, i) => word[0] !== theirs[i]?.[0]);
  if (at >= 0) {
    const [word] = mine[at], start = mine[at].index;
    const mark = element("mark", {title: "first word that differs"}, word);
    return [text.slice(0, start), mark, text.slice(start + word.length)];
  }
  const isShorter = mine.length < theirs.length;
  return isShorter ? [text, element("mark", {title: "ends before the recipient's"}, "⏎")] : [text];
};

const change = value => element("span", {class: `change ${value > 0 ? "up" : value < 0 ? "down" : ""}`}, signed(value));

/** The browser over opened texts. chosen(): judge, recipient and strength of the page. Returns what shows it anew. */
const browse = ({cases, points, byCase, read, lowered}, chosen) => {
  const set = choice(byId("of-set"), [null, ...distinct(cases.map(one => one.set))], {label: name => name ?? "all"});
  const sort = choice(byId("sort"), ["as asked", "largest change", "highest score", "lowest score"]);
  let at, cast, matches = [], here = 0, latest = 0;

  /** The points to compare under the page's choice: recipient, donor, then each ranking's windows. */
  const recast = () => {
    const {recipient, strength} = chosen();
    const numbered = points.map((point, number) => ({...point, number}));
    const rankings = rankingsOf(points);
    const patched = numbered.filter(point => isDefined(point.ranking) && isSame({recipient, strength}, point))
      .sort((one, other) => rankings.indexOf(one.ranking) - rankings.indexOf(other.ranking) || one.lo - other.lo
        || one.hi - other.hi || (one.control_seed ?? -1) - (other.control_seed ?? -1));
    const donor = patched[0]?.donor;
    const plain = name => numbered.find(point => !isDefined(point.ranking) && point.recipient === name);
    const own = patched.filter(point => !isDefined(point.control_seed));
    const last = own.findLastIndex(point => point.ranking === own[0].ranking && isTop(point));
    const kept = at?.() ? own.findIndex(point => nameOf(point) === nameOf(at())) : -1;
    at = choice(byId("at"), own, {label: nameOf, chosen: kept >= 0 ? kept : last, always: own.length > 0});
    cast = {donor, base: plain(recipient), all: [plain(recipient), plain(donor), ...patched].filter(Boolean)};
    byId("controls").closest("label").hidden = own.length === patched.length;
  };

  const shown = () => cast.all.filter(point => !isDefined(point.control_seed) || byId("controls").checked);
  const score = (one, point) => point && byCase[one].get(point.number)?.scores[chosen().judge];
  const changed = (one, point) => {
    const [mine, base] = [score(one, point), score(one, cast.base)];
    return isDefined(mine) && isDefined(base) ? mine - base : null;
  };

  const find = async () => {
    const ticket = ++latest;
    const query = byId("query").value.trim().toLowerCase();
    if (query) byId("place").textContent = "Reading texts …";
    const holds = query && await lowered();
    if (ticket !== latest) return;
    const seen = cases[matches[here]];
    const point = at() ?? cast.base;
    const [least, most] = ["least", "most"].map(id => byId(id).valueAsNumber);
    const isAny = Number.isNaN(least) && Number.isNaN(most);
    const isWithin = value => isDefined(value) && !(value < least) && !(value > most);
    const fits = one => (set() === null || cases[one].set === set()) && (isAny || isWithin(score(one, point)))
      && (!query || holds(query, one, shown()));
    const measure = {
      "largest change": one => isDefined(changed(one, point)) ? Math.abs(changed(one, point)) : null,
      "highest score": one => score(one, point),
      "lowest score": one => score(one, point),
    }[sort()];
    matches = [...cases.keys()].filter(fits);
    const up = sort() === "lowest score" ? 1 : -1;
    if (measure) matches.sort((one, other) => compared(measure(one), measure(other), up));
    await show(measure ? 0 : Math.max(0, matches.findIndex(one => cases[one] === seen)));
  };

  const show = async number => {
    here = Math.min(Math.max(0, number), Math.max(0, matches.length - 1));
    byId("place").textContent = matches.length ? `Prompt ${here + 1} of ${matches.length}` : "No prompt fits.";
    byId("previous").disabled = here === 0;
    byId("next").disabled = here >= matches.length - 1;
    list();
    if (!matches.length) return byId("case").replaceChildren();
    const ticket = ++latest, one = matches[here];
    const texts = shown().map(point => ({point, text: byCase[one].get(point.number)})).filter(({text}) => text);
    await read(texts.map(({text}) => text));
    if (ticket !== latest) return;
    const {set, prompt_index, seed, prompt} = cases[one];
    const base = byCase[one].get(cast.base?.number);
    byId("case").replaceChildren(
      element("p", {class: "note"}, `${set}, prompt ${prompt_index}${isDefined(seed) ? `, seed ${seed}` : ""}`),
      element("p", {class: "prompt"}, prompt),
      element("div", {class: "cards"}, ...texts.map(({point, text}) => card(point, text, base))));
    highlight();
  };

  const list = () => {
    const start = here - here % LISTED, point = at(), hadFocus = byId("matches").contains(document.activeElement);
    byId("matches").replaceChildren(...matches.slice(start, start + LISTED).map((one, i) => {
      const moved = changed(one, point);
      const button = element("button", {type: "button", ...(start + i === here && {"aria-current": "true"})},
        element("span", {}, cases[one].prompt), isDefined(moved) ? change(moved) : "");
      button.addEventListener("click", () => show(start + i));
      return element("li", {}, button);
    }));
    const current = byId("matches").querySelector("[aria-current]");
    if (hadFocus) current?.focus({preventScroll: true});
    if (current) byId("matches").scrollTop = current.offsetTop - byId("matches").offsetTop - 80;
  };

  /** Why a card has no words: an empty answer, one that failed, one that nobody has written yet. */
  const absence = text => text.completion === "" ? "empty answer"
    : text.state === "failed" ? `failed: ${text.error}` : "not written yet";

  const card = (point, text, base) => {
    const {judge} = chosen();
    const isControl = isDefined(point.control_seed);
    const kinds = [!isDefined(point.ranking) && "unpatched", isControl && "control", point === at() && "here"];
    const names = distinct([judge, ...Object.keys(text.scores)]).filter(name => isDefined(text.scores[name]));
    const scores = names.map(name => {
      const own = text.scores[name], unpatched = base === text ? null : base?.scores[name];
      return element("div", {}, `${name} ${cell(own)} `, isDefined(unpatched) ? change(own - unpatched) : "");
    });
    const isOwn = !base || base === text || !isDefined(base.completion) || !isDefined(text.completion);
    const content = !text.completion ? [element("em", {}, absence(text))]
      : isOwn ? [text.completion] : differing(text.completion, base.completion);
    const overwritten = `${(text.overwrites ?? 0).toLocaleString("en")} overwrites counted`;
    return element("section", {class: ["card", ...kinds.filter(Boolean)].join(" ")},
      element("h3", {}, nameOf(point, cast.donor)),
      element("div", {class: "scores"}, ...scores),
      element("p", {class: "text", dir: "auto"}, ...content),
      element("p", {class: "receipt"}, [overwritten, text.finish_reason && `ended by ${text.finish_reason}`,
        !isOwn && text.completion === base.completion && "same text as unpatched"].filter(Boolean).join(" · ")));
  };

  /** The words searched for, where they are shown. */
  const highlight = () => {
    const query = byId("query").value.trim().toLowerCase();
    if (!globalThis.Highlight) return;
    const ranges = [];
    const walk = document.createTreeWalker(byId("case"), NodeFilter.SHOW_TEXT);
    while (query && walk.nextNode()) {
      const text = walk.currentNode.data.toLowerCase().slice(0, walk.currentNode.length); // lower case may be longer
      for (let i = text.indexOf(query); i >= 0; i = text.indexOf(query, i + query.length)) {
        const range = document.createRange();
        range.setStart(walk.currentNode, i);
        range.setEnd(walk.currentNode, i + query.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };

  let waiting;
  byId("query").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 150);
  });
  for (const id of ["of-set", "at", "least", "most", "sort", "controls"]) byId(id).addEventListener("change", find);
  byId("previous").addEventListener("click", () => show(here - 1));
  byId("next").addEventListener("click", () => show(here + 1));
  document.addEventListener("keydown", event => {
    const isTyping = event.target.closest("input, select, textarea, .scroll, .js-plotly-plot");
    if (event.key === "Escape" && event.target === byId("query")) byId("query").blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1}[event.key];
    if (event.key === "/") byId("query").focus();
    else if (step && matches[here + step] !== undefined) show(here + step);
    else return;
    event.preventDefault();
  });
  return () => {
    recast();
    return find();
  };
};
