// The browser of completions: prompts filtered by text, score and change, with each prompt's completions side by side.

const PROMPTS_LISTED = 50; // at once

const memoize = compute => {
  let value;
  return () => value ??= compute();
};

const decompress = script => {
  const bytes = Uint8Array.from(atob(script.textContent), character => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

/** Open the page's completions. records[i].completion is set once its chunk is decompressed, see `load`. */
const openCompletions = async () => {
  const [first, ...scripts] = document.querySelectorAll('script[type="application/json-gz"]');
  const {chunk_size: chunkSize, cases, points, records} = await decompress(first);
  const byCase = cases.map(() => new Map());
  records.forEach((record, number) => byCase[record.case].set(record.point, Object.assign(record, {number})));
  const chunks = scripts.map((script, chunk) => memoize(async () =>
    (await decompress(script)).forEach((completion, i) => records[chunk * chunkSize + i].completion = completion)));
  const load = wanted =>
    Promise.all(distinct(wanted.map(record => Math.floor(record.number / chunkSize))).map(chunk => chunks[chunk]()));
  /** Return a search: does a case's prompt, or one of its completions at these points, contain the lower-case query? */
  const buildSearch = memoize(async () => {
    await load(records);
    const completions = records.map(record => (record.completion ?? "").toLowerCase());
    const prompts = cases.map(({prompt}) => prompt.toLowerCase());
    return (query, number, points) => prompts[number].includes(query)
      || points.some(point => completions[byCase[number].get(point.number)?.number]?.includes(query));
  });
  return {cases, points, records, byCase, load, buildSearch};
};

const pointLabel = (point, donor) => {
  if (!isDefined(point.ranking)) return `${point.recipient}, unpatched${point.recipient === donor ? ", donor" : ""}`;
  const seed = isDefined(point.control_seed) ? ` ${point.control_seed}` : "";
  const kind = CONTROL_NAMES[point.control] ?? "random control";
  const control = isControl(point) ? `${kind}${seed} of ` : "";
  return `${windowLabel(point)}, ${control}${point.ranking}`;
};

const POINT_FIELDS = ["recipient", "donor", "ranking", "control", "control_seed", "rank_lo", "rank_hi", "strength"];
const isSamePoint = (one, other) => POINT_FIELDS.every(name => one[name] === other[name]);

/** Mark the first word of a completion that differs from the reference, or its end if the reference continues. */
const markDifference = (completion, reference) => {
  const splitWords = string => [...string.matchAll(/\S+/g)];
  const words = splitWords(completion), referenceWords = splitWords(reference);
  const first = words.findIndex((word, i) => word[0] !== referenceWords[i]?.[0]);
  if (first >= 0) {
    const [word] = words[first], start = words[first].index;
    const mark = element("mark", {title: "first word that differs"}, word);
    return [completion.slice(0, start), mark, completion.slice(start + word.length)];
  }
  const isShorter = words.length < referenceWords.length;
  return isShorter ? [completion, element("mark", {title: "ends before the recipient's"}, "⏎")] : [completion];
};

const changeLabel = value =>
  element("span", {class: `change ${value > 0 ? "up" : value < 0 ? "down" : ""}`}, formatSigned(value));

/**
 * Create the browser of completions. selection(): the page's judge, donor, recipient, set, strength and window.
 *
 * Return show(wanted), which refreshes it and selects the wanted point, and open(row), which also moves there.
 */
const createBrowser = ({cases, points, byCase, load, buildSearch}, selection) => {
  const setNames = [null, ...distinct(cases.map(({set}) => set))];
  const selectedSet = fillSelect(byId("of-set"), setNames, {label: name => name ?? "all"});
  const selectedOrder = fillSelect(byId("sort"), ["original order", "largest change", "highest score", "lowest score"]);
  let selectedPoint, compared, matches = [], position = 0, latestTicket = 0;

  /** Collect the points to compare for the page's selection: recipient, donor, then each ranking's windows. */
  const collectPoints = wanted => {
    const {recipient, donor, strength, window} = selection();
    const numbered = points.map((point, number) => ({...point, number}));
    const rankings = rankingNames(points);
    const wantedFields = {recipient, donor, strength};
    const patched = numbered.filter(point => isDefined(point.ranking) && matchesFields(wantedFields, point))
      .sort((a, b) => rankings.indexOf(a.ranking) - rankings.indexOf(b.ranking) || a.rank_lo - b.rank_lo
        || a.rank_hi - b.rank_hi || String(a.control ?? "").localeCompare(b.control ?? "")
        || (a.control_seed ?? -1) - (b.control_seed ?? -1));
    const findUnpatched = name => numbered.find(point => !isDefined(point.ranking) && point.recipient === name);
    const unpatched = distinct([recipient, donor]).map(findUnpatched).filter(isDefined);
    const visible = [...unpatched, ...patched.filter(point => !isControl(point) || byId("controls").checked)];
    compared = {donor, recipient: findUnpatched(recipient), points: visible};
    const neurons = patched.filter(point => !isControl(point)), previous = selectedPoint?.();
    const selected = wanted && visible.find(point => isSamePoint(point, wanted))
      || previous && visible.find(point => pointLabel(point) === pointLabel(previous))
      || neurons.find(point => isSameWindow(point, window))
      || neurons.findLast(point => point.ranking === neurons[0].ranking && isTop(point));
    selectedPoint = fillSelect(byId("at"), visible, {label: point => pointLabel(point, donor)});
    selectedPoint.choose(selected);
    byId("controls").closest("label").hidden = !patched.some(isControl);
  };

  /** Return the compared points: both unpatched models, the selected point, then all others. */
  const visiblePoints = () => {
    const place = point => !isDefined(point.ranking) ? 0 : point === selectedPoint() ? 1 : 2;
    return compared.points.toSorted((a, b) => place(a) - place(b));
  };
  const getScore = (number, point) => point && byCase[number].get(point.number)?.scores[selection().judge];
  const getChange = (number, point) => {
    if (point === compared.recipient) return null;
    const [score, unpatched] = [getScore(number, point), getScore(number, compared.recipient)];
    return isDefined(score) && isDefined(unpatched) ? score - unpatched : null;
  };

  const filterPrompts = async () => {
    const ticket = ++latestTicket;
    const query = byId("query").value.trim().toLowerCase();
    if (query) byId("place").textContent = "Loading completions …";
    const contains = query && await buildSearch();
    if (ticket !== latestTicket) return;
    const current = cases[matches[position]];
    const point = selectedPoint() ?? compared.recipient;
    const [min, max] = ["least", "most"].map(id => byId(id).valueAsNumber);
    const hasNoLimits = Number.isNaN(min) && Number.isNaN(max);
    const isWithinLimits = score => isDefined(score) && !(score < min) && !(score > max);
    const isMatch = number => (selectedSet() === null || cases[number].set === selectedSet())
      && (hasNoLimits || isWithinLimits(getScore(number, point)))
      && (!query || contains(query, number, visiblePoints()));
    const sortKey = {
      "largest change": number => isDefined(getChange(number, point)) ? Math.abs(getChange(number, point)) : null,
      "highest score": number => getScore(number, point),
      "lowest score": number => getScore(number, point),
    }[selectedOrder()];
    matches = [...cases.keys()].filter(isMatch);
    const sign = selectedOrder() === "lowest score" ? 1 : -1;
    if (sortKey) matches.sort((a, b) => compareCells(sortKey(a), sortKey(b), sign));
    await showPrompt(sortKey ? 0 : Math.max(0, matches.findIndex(number => cases[number] === current)));
  };

  const showPrompt = async wanted => {
    position = Math.min(Math.max(0, wanted), Math.max(0, matches.length - 1));
    byId("place").textContent = matches.length ? `Prompt ${position + 1} of ${matches.length}` : "No prompt matches.";
    byId("previous").disabled = position === 0;
    byId("next").disabled = position >= matches.length - 1;
    listPrompts();
    if (!matches.length) return byId("case").replaceChildren();
    const ticket = ++latestTicket, number = matches[position];
    const entries = visiblePoints().map(point => ({point, record: byCase[number].get(point.number)}))
      .filter(({record}) => record);
    await load(entries.map(({record}) => record));
    if (ticket !== latestTicket) return;
    const {set, prompt_index, seed, prompt} = cases[number];
    const unpatched = byCase[number].get(compared.recipient?.number);
    byId("case").replaceChildren(
      element("p", {class: "note"}, `${set}, prompt ${prompt_index}${isDefined(seed) ? `, seed ${seed}` : ""}`),
      element("p", {class: "prompt"}, prompt),
      element("div", {class: "cards"}, ...entries.map(({point, record}) => completionCard(point, record, unpatched))));
    highlightQuery();
  };

  const listPrompts = () => {
    const start = position - position % PROMPTS_LISTED, point = selectedPoint();
    const hadFocus = byId("matches").contains(document.activeElement);
    byId("matches").replaceChildren(...matches.slice(start, start + PROMPTS_LISTED).map((number, i) => {
      const change = getChange(number, point);
      const button = element("button", {type: "button", ...(start + i === position && {"aria-current": "true"})},
        element("span", {}, cases[number].prompt), isDefined(change) ? changeLabel(change) : "");
      button.addEventListener("click", () => showPrompt(start + i));
      return element("li", {}, button);
    }));
    const current = byId("matches").querySelector("[aria-current]");
    if (hadFocus) current?.focus({preventScroll: true});
    if (current) byId("matches").scrollTop = current.offsetTop - byId("matches").offsetTop - 80;
  };

  /** Return why a record has no completion to show: it is empty, it failed, or it is not written yet. */
  const missingReason = record => record.completion === "" ? "empty completion"
    : record.state === "failed" ? `failed: ${record.error}` : "not written yet";

  const completionCard = (point, record, unpatched) => {
    const {judge} = selection();
    const isSelected = point === selectedPoint();
    const classes = [!isDefined(point.ranking) && "unpatched", isControl(point) && "control", isSelected && "here"];
    const judges = distinct([judge, ...Object.keys(record.scores)]).filter(name => isDefined(record.scores[name]));
    const scores = judges.map(name => {
      const score = record.scores[name], before = unpatched === record ? null : unpatched?.scores[name];
      const change = isDefined(before) ? changeLabel(score - before) : "";
      return element("div", {}, `${name} ${formatValue(score)} `, change);
    });
    const isComparable = unpatched && unpatched !== record
      && isDefined(unpatched.completion) && isDefined(record.completion);
    const content = !record.completion ? [element("em", {}, missingReason(record))]
      : isComparable ? markDifference(record.completion, unpatched.completion) : [record.completion];
    const overwrites = `${(record.overwrites ?? 0).toLocaleString("en")} overwrites counted`;
    return element("section", {class: ["card", ...classes.filter(Boolean)].join(" ")},
      element("h3", {}, pointLabel(point, compared.donor)),
      element("div", {class: "scores"}, ...scores),
      element("p", {class: "text", dir: "auto"}, ...content),
      element("p", {class: "receipt"}, [overwrites, record.finish_reason && `ended by ${record.finish_reason}`,
        isComparable && record.completion === unpatched.completion && "same completion as unpatched"]
        .filter(Boolean).join(" · ")));
  };

  /** Highlight the query in the prompt and completions. */
  const highlightQuery = () => {
    const query = byId("query").value.trim().toLowerCase();
    if (!globalThis.Highlight) return;
    const ranges = [];
    const walk = document.createTreeWalker(byId("case"), NodeFilter.SHOW_TEXT);
    while (query && walk.nextNode()) {
      const text = walk.currentNode.data.toLowerCase().slice(0, walk.currentNode.length); // lower case can be longer
      for (let i = text.indexOf(query); i >= 0; i = text.indexOf(query, i + query.length)) {
        const range = document.createRange();
        range.setStart(walk.currentNode, i);
        range.setEnd(walk.currentNode, i + query.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };

  let timer;
  byId("query").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filterPrompts, 150);
  });
  byId("controls").addEventListener("change", () => show());
  for (const id of ["of-set", "at", "least", "most", "sort"]) byId(id).addEventListener("change", filterPrompts);
  byId("previous").addEventListener("click", () => showPrompt(position - 1));
  byId("next").addEventListener("click", () => showPrompt(position + 1));
  document.addEventListener("keydown", event => {
    const isTyping = event.target.closest("input, select, textarea, .scroll, .js-plotly-plot");
    if (event.key === "Escape" && event.target === byId("query")) byId("query").blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1}[event.key];
    if (event.key === "/") byId("query").focus();
    else if (step && matches[position + step] !== undefined) showPrompt(position + step);
    else return;
    event.preventDefault();
  });
  const show = wanted => {
    collectPoints(wanted);
    return filterPrompts();
  };
  const open = async row => {
    selectedSet.choose(selection().set);
    byId("controls").checked ||= isControl(row);
    await show(row);
    byId("completions").scrollIntoView();
    byId("case").focus({preventScroll: true});
  };
  return {show, open};
};
