"use strict";
// The reading view. Corpus text enters the page as text nodes only.

const element = (id) => document.getElementById(id);
const make = (tag, content = "", className = "") => {
  const made = document.createElement(tag);
  made.append(content);
  made.className = className;
  return made;
};

const LEARN = 0, DELEGATE = 1, IGNORE = 2;
const RULES = { lacy: "Slider: factual tokens of the highest loss", loss: "Slider: any tokens of the highest loss" };
const LOSS_STEPS = [0.5, 1, 2, 3, 4, 6, 8]; // nats, where the shades of the loss change
const JUDGE_STEPS = [0.01, 0.2, 0.4, 0.6, 0.8, 0.9, 1];
const BEGINNING = 40; // characters of a document in the list
const CORRECT = [null, "no", "yes"];

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function decode(raw, codes, units) {
  const count = raw.start.length;
  const code = (packed) => Uint8Array.from(packed, (character) => character.charCodeAt(0) - codes);
  const numbers = (list, unit) => list && Float64Array.from(list, (value) => (value === null ? NaN : value / unit));
  const start = new Uint32Array(count), end = new Uint32Array(count);
  for (let i = 0, place = 0; i < count; i++) {
    place += raw.start[i];
    start[i] = place;
    end[i] = place + raw.length[i];
  }
  const signals = {
    factual: code(raw.factual), pos: code(raw.pos), ent: code(raw.ent), correct: raw.correct && code(raw.correct),
    ref: numbers(raw.ref, units), student: numbers(raw.student, units), judge: numbers(raw.judge, 100),
  };
  const loss = signals.student ?? signals.ref;
  const sets = raw.labels.map(code);
  const ranked = (rule) => loss.filter((value, i) => i > 0 && value >= 0 && candidate(rule, signals.factual[i])).sort();
  return { ...raw, ...signals, count, start, end, loss, sets, pieces: pieces(start, end),
    chosen: sets.map((codes) => codes.reduce((sum, label) => sum + (label !== LEARN), 0)),
    ranked: Object.fromEntries(Object.keys(RULES).map((rule) => [rule, ranked(rule)])) };
}

/** Whether a rule of the slider may choose a token. */
const candidate = (rule, factual) => rule === "loss" || factual === 1;

/** The place of the first of sorted values that is not below `value`. */
function lowerBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Tokens that share characters, as of an emoji, stand in the page as one piece. */
function pieces(start, end) {
  const found = [];
  for (let i = 0; i < start.length; i++) {
    const last = found.at(-1);
    if (last && start[i] < last.end) {
      last.end = Math.max(last.end, end[i]);
      last.last = i;
    } else {
      found.push({ start: start[i], end: end[i], first: i, last: i });
    }
  }
  return found;
}

function reader(data) {
  const documents = data.documents.map((raw) => decode(raw, data.codes, data.units));
  const scored = documents.some((doc) => doc.loss.some((value) => !Number.isNaN(value)));
  const judged = documents.some((doc) => doc.judge);
  const tokens = documents.reduce((sum, doc) => sum + doc.count, 0);
  const state = { at: 0, labels: data.sets.length ? `set ${data.chosen ?? 0}` : scored ? "rule lacy" : "none",
    colour: "label", threshold: 0, pinned: null, hits: [], hit: -1 };
  let spans = [], labels = [];

  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "-");
  const nats = (value) => (Number.isNaN(value) ? "none" : `${value.toFixed(2)} nats`);
  const currentSet = () => (state.labels.startsWith("set ") ? Number(state.labels.slice(4)) : null);
  const currentRule = () => (state.labels.startsWith("rule ") ? state.labels.slice(5) : null);

  /** (tokens,) the codes of a document's labels: those on disk, or what the slider's rule says. */
  function labelsOf(doc) {
    const set = currentSet(), rule = currentRule();
    if (set !== null) return doc.sets[set];
    return Uint8Array.from(doc.loss, (loss, i) =>
      rule && i > 0 && loss >= state.threshold && candidate(rule, doc.factual[i]) ? DELEGATE : LEARN);
  }

  /** How many of its tokens are not learned. */
  function chosenOf(doc) {
    const set = currentSet(), rule = currentRule();
    if (set !== null) return doc.chosen[set];
    return rule ? doc.ranked[rule].length - lowerBound(doc.ranked[rule], state.threshold) : 0;
  }
  const shareOf = (doc) => chosenOf(doc) / Math.max(1, doc.count);
  const byLoss = (set) => Boolean(set && set.policy in RULES && set.threshold !== null);
  const verb = () => (data.sets[currentSet()]?.action === "ignore" ? "ignored" : "delegated");

  // The controls

  function fillLabels() {
    const select = element("labels");
    data.sets.forEach((set, i) => select.append(new Option(set.name, `set ${i}`)));
    if (scored) for (const [rule, text] of Object.entries(RULES)) select.append(new Option(text, `rule ${rule}`));
    if (!select.length) select.append(new Option("none", "none"));
    select.value = state.labels;
  }

  function fillColours() {
    const kinds = { label: "label", loss: scored && "loss", factual: "factual", judge: judged && "judge" };
    for (const [value, text] of Object.entries(kinds)) {
      if (!text) continue;
      const input = Object.assign(document.createElement("input"), { type: "radio", name: "colour", value });
      input.checked = value === state.colour;
      const label = make("label", input);
      label.append(text);
      element("colour").append(label);
    }
  }

  function fillSlider() {
    element("slider-row").hidden = !scored;
    const highest = documents.reduce((most, doc) => doc.loss.reduce((a, b) => (b > a ? b : a), most), 1);
    element("threshold").max = Math.ceil(Math.min(highest, 20));
    const set = data.sets[data.chosen];
    setThreshold(byLoss(set) ? set.threshold : data.budgets[0]?.[1] ?? 1);
    if (data.budgets.length) element("budgets").append(make("span", "Budget", "name"));
    for (const [budget, threshold] of data.budgets) {
      const button = make("button", `${Math.round(100 * budget)}%`);
      button.type = "button";
      button.title = `The threshold that chooses ${Math.round(100 * budget)}% of all tokens of the dataset`;
      button.addEventListener("click", () => slide(threshold, data.policy));
      element("budgets").append(button);
    }
  }

  function setThreshold(value) {
    element("threshold").value = value;
    state.threshold = Number(element("threshold").value);
  }

  function slide(threshold, rule) {
    setThreshold(threshold);
    state.labels = `rule ${rule ?? currentRule() ?? data.policy}`;
    element("labels").value = state.labels;
    relabel();
  }

  function tellPicked() {
    const rule = currentRule();
    const set = data.sets[currentSet()];
    const picked = documents.reduce((sum, doc) => sum + chosenOf(doc), 0);
    const threshold = rule ? state.threshold : byLoss(set) ? set.threshold : null;
    const from = threshold === null ? "" : `${threshold.toFixed(2)} nats: `;
    element("picked").textContent = set || rule ? `${from}${share(picked, tokens)} of the tokens on this page` : "";
    element("threshold").setAttribute("aria-valuetext", `${state.threshold.toFixed(2)} nats`);
    element("verb").textContent = verb();
  }

  const beginning = (doc) => [...doc.text.slice(0, 1000).trimStart()].slice(0, BEGINNING).join("").split("\n", 1)[0];

  function listDocuments() {
    const select = element("document");
    if (!select.length) documents.forEach((doc, i) => select.append(new Option("", i)));
    documents.forEach((doc, i) => (select.options[i].text = `${doc.id} · ${share(chosenOf(doc), doc.count)} · ${beginning(doc)}`));
    select.value = state.at;
  }

  // The document

  function show(at) {
    state.at = (at + documents.length) % documents.length;
    state.pinned = null;
    const doc = documents[state.at];
    const page = document.createDocumentFragment();
    let place = 0;
    spans = doc.pieces.map((piece, i) => {
      const text = doc.text.slice(piece.start, piece.end);
      const gap = text.trim() ? text.length - text.trimStart().length : 0;
      page.append(doc.text.slice(place, piece.start + gap));
      const span = make("span", text.slice(gap));
      span.dataset.piece = i;
      if (!text.trim() && text.includes("\n")) span.dataset.blank = "↵";
      page.append(span);
      place = piece.end;
      return span;
    });
    page.append(doc.text.slice(place));
    element("text").replaceChildren(page);
    element("heading").replaceChildren(make("bdi", doc.id));
    element("document").value = state.at;
    element("cut").hidden = doc.count === doc.tokens;
    element("cut").textContent = `Cut here: ${doc.count.toLocaleString("en")} of ${doc.tokens.toLocaleString("en")} tokens are in the page.`;
    tint();
    signals(null);
  }

  function tint() {
    const doc = documents[state.at];
    labels = labelsOf(doc);
    doc.pieces.forEach((piece, i) => {
      const of = (values) => values.subarray(piece.first, piece.last + 1);
      const codes = of(labels);
      spans[i].className = [
        codes.includes(DELEGATE) ? "delegate" : codes.includes(IGNORE) ? "ignore" : "",
        state.colour === "factual" && of(doc.factual).includes(1) ? "factual" : "",
        state.colour === "loss" ? shade(Math.max(...of(doc.loss)), LOSS_STEPS) : "",
        state.colour === "judge" && doc.judge ? shade(Math.max(...of(doc.judge)), JUDGE_STEPS) : "",
        state.pinned === i ? "pinned" : "",
      ].filter(Boolean).join(" ");
    });
    element("text").dataset.colour = state.colour;
    const counts = [DELEGATE, IGNORE].map((code) => labels.reduce((sum, of) => sum + (of === code), 0));
    const parts = [`${doc.count.toLocaleString("en")} tokens`];
    if (counts[0] || !counts[1]) parts.push(`${share(counts[0], doc.count)} delegated`);
    if (counts[1]) parts.push(`${share(counts[1], doc.count)} ignored`);
    const source = make("bdi", doc.source.slice(doc.source.lastIndexOf("/") + 1));
    element("about").replaceChildren(`${parts.join(", ")} · `, source);
    markHits();
    legend();
  }

  const shade = (value, steps) => (Number.isNaN(value) ? "unscored" : `shade${steps.filter((step) => value >= step).length}`);

  function legend() {
    const items = [];
    const sample = (text, className) => items.push(make("span", text, className), " ");
    if (state.colour === "loss" || state.colour === "judge") {
      const steps = state.colour === "loss" ? LOSS_STEPS : JUDGE_STEPS;
      items.push(state.colour === "loss" ? "Loss, nats: " : "Judge: ");
      [0, ...steps].forEach((step, i) => sample(`${i ? step : "0"}${i === steps.length && state.colour === "loss" ? "+" : ""}`, `swatch shade${i}`));
    }
    if (state.colour === "factual") sample("factual", "factual");
    const set = data.sets[currentSet()];
    const kinds = set?.action === "ignore" ? ["ignore"] : ["delegate"];
    if (state.labels !== "none") for (const kind of kinds) sample(kind === "ignore" ? "ignored in training" : "delegated to the larger model", kind);
    if (state.labels !== "none") items.push("the rest is learned");
    element("legend").dataset.colour = state.colour;
    element("legend").replaceChildren(...items);
  }

  function relabel() {
    tint();
    tellPicked();
    listDocuments();
    signals(state.pinned);
  }

  // The signals of a token

  function rows(doc, i) {
    const name = (table, code) => data.names[table][code] || "none";
    const list = [["position", String(i)], ["label", data.names.label[labels[i]]], ["factual", doc.factual[i] ? "yes" : "no"],
      ["part of speech", name("pos", doc.pos[i])], ["entity", name("ent", doc.ent[i])], [doc.student ? "loss, reference" : "loss", nats(doc.ref[i])]];
    if (doc.correct?.[i]) list.push(["reference right", CORRECT[doc.correct[i]]]);
    if (doc.student) {
      list.push(["loss, student", nats(doc.student[i])], ["student − reference", nats(doc.student[i] - doc.ref[i])]);
    }
    if (doc.judge) list.push(["judge", Number.isNaN(doc.judge[i]) ? "none" : doc.judge[i].toFixed(2)]);
    const choosing = data.sets.filter((set, k) => doc.sets[k][i] !== LEARN).map((set) => set.name);
    if (data.sets.length) list.push(["chosen by", choosing.join(", ") || "no label set"]);
    return list;
  }

  /** Show a piece's signals, or with null what there is to do. */
  function signals(i) {
    const panel = element("signals");
    panel.classList.toggle("open", i !== null);
    if (i === null) {
      panel.replaceChildren(make("p", "Point at a token, or tap it, for its signals. Press ? for the keys.", "note"));
      return;
    }
    const doc = documents[state.at], piece = doc.pieces[i];
    const close = Object.assign(make("button", "×", "close"), { type: "button", ariaLabel: "Close" });
    close.addEventListener("click", () => pin(null));
    const heading = make("p", make("bdi", visible(doc.text.slice(piece.start, piece.end))), "token");
    panel.replaceChildren(...(state.pinned === null ? [] : [close]), heading);
    for (let k = piece.first; k <= piece.last; k++) {
      const list = make("dl");
      for (const [term, value] of rows(doc, k)) {
        const row = make("div", make("dt", term));
        row.append(make("dd", make("bdi", value)));
        list.append(row);
      }
      panel.append(list);
    }
    if (piece.last > piece.first) panel.append(make("p", "These tokens share their characters.", "note"));
  }

  const visible = (text) => text.replaceAll("\n", "↵").replace(/^ +| +$/g, (gap) => "␣".repeat(gap.length)) || "(empty)";

  function pin(i) {
    spans[state.pinned]?.classList.remove("pinned");
    state.pinned = i;
    signals(i);
    if (i === null) return;
    spans[i].classList.add("pinned");
    spans[i].scrollIntoView({ block: "nearest" });
    const doc = documents[state.at], piece = doc.pieces[i];
    const said = rows(doc, piece.first).slice(1).map(([term, value]) => `${term} ${value}`);
    element("spoken").textContent = `${doc.text.slice(piece.start, piece.end)}: ${said.join(", ")}`;
  }

  /** The piece of the next or last line that is nearest to the one at `i`. */
  function lineFrom(i, step) {
    const box = (k) => spans[k].getClientRects()[0] ?? spans[k].getBoundingClientRect();
    const from = box(i);
    const far = (k) => Math.abs(box(k).left + box(k).width / 2 - (from.left + from.width / 2));
    let k = i + step;
    while (spans[k] && Math.abs(box(k).top - from.top) < from.height / 2) k += step;
    if (!spans[k]) return i;
    let best = k;
    for (const top = box(k).top; spans[k] && Math.abs(box(k).top - top) < from.height / 2; k += step) {
      if (far(k) < far(best)) best = k;
    }
    return best;
  }

  // Search

  function search(query) {
    state.hits = [];
    state.hit = -1;
    if (query) {
      const pattern = new RegExp(query.replace(/[\\^$.*+?()[\]{}|/-]/g, (c) => (c === "-" ? "\\x2d" : `\\${c}`)), "giu");
      documents.forEach((doc, at) => {
        for (const match of doc.text.matchAll(pattern)) state.hits.push({ at, start: match.index, end: match.index + match[0].length });
      });
    }
    const here = state.hits.findIndex((hit) => hit.at >= state.at);
    if (state.hits.length) go(here < 0 ? 0 : here);
    else markHits();
    tellFound(query);
  }

  function tellFound(query) {
    const among = new Set(state.hits.map((hit) => hit.at)).size;
    element("found").textContent = !query ? "" : !state.hits.length ? "not found"
      : `${state.hit + 1} of ${state.hits.length}, in ${among} ${among === 1 ? "document" : "documents"}`;
  }

  function go(hit) {
    state.hit = (hit + state.hits.length) % state.hits.length;
    if (state.hits[state.hit].at !== state.at) show(state.hits[state.hit].at);
    else markHits();
    element("text").querySelector(".now")?.scrollIntoView({ block: "center" });
    tellFound(true);
  }

  function markHits() {
    const doc = documents[state.at];
    for (const span of element("text").querySelectorAll(".hit")) span.classList.remove("hit", "now");
    const ends = state.hits.length ? doc.pieces.map((piece) => piece.end) : [];
    state.hits.forEach((hit, k) => {
      if (hit.at !== state.at) return;
      for (let i = lowerBound(ends, hit.start + 1); i < spans.length && doc.pieces[i].start < hit.end; i++) {
        spans[i].classList.add("hit");
        if (k === state.hit) spans[i].classList.add("now");
      }
    });
  }

  // What the reader does

  /** The document with the next lower share; after the lowest, the highest. */
  function mostNext() {
    const order = documents.map((doc, at) => ({ at, share: shareOf(doc) })).sort((a, b) => b.share - a.share || a.at - b.at);
    const place = order.findIndex((doc) => doc.at === state.at);
    show(order[(place + 1) % order.length].at);
  }

  function nextOption(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.length;
    select.dispatchEvent(new Event("change"));
  }

  function nextColour() {
    const inputs = [...element("colour").querySelectorAll("input")];
    inputs[(inputs.findIndex((input) => input.checked) + 1) % inputs.length].click();
  }

  function moveIn(key) {
    const i = state.pinned, last = spans.length - 1;
    if (last < 0) return false;
    const to = { ArrowRight: i === null ? 0 : Math.min(last, i + 1), ArrowLeft: i === null ? 0 : Math.max(0, i - 1),
      Home: 0, End: last, ArrowDown: i === null ? 0 : lineFrom(i, 1), ArrowUp: i === null ? 0 : lineFrom(i, -1) }[key];
    if (to === undefined) return false;
    pin(to);
    return true;
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || element("help").open) return;
    const target = event.target;
    if (event.key === "Escape") {
      if (target === element("search")) target.value = "", search(""), target.blur();
      pin(null);
      return;
    }
    if (target.matches("input, select, textarea")) return;
    const inText = target === element("text");
    const keys = {
      j: () => show(state.at + 1), k: () => show(state.at - 1), n: mostNext, l: () => nextOption(element("labels")), c: nextColour,
      "/": () => element("search").focus(), "?": () => element("help").showModal(), t: () => element("text").focus(),
    };
    if (!inText && target === document.body) Object.assign(keys, { ArrowRight: keys.j, ArrowLeft: keys.k });
    if (inText && moveIn(event.key)) event.preventDefault();
    else if (Object.hasOwn(keys, event.key)) {
      event.preventDefault();
      keys[event.key]();
    }
  }

  const pieceOf = (event) => {
    const span = event.target.closest?.("[data-piece]");
    return span ? Number(span.dataset.piece) : null;
  };

  function listen() {
    element("previous").addEventListener("click", () => show(state.at - 1));
    element("next").addEventListener("click", () => show(state.at + 1));
    element("most").addEventListener("click", mostNext);
    element("document").addEventListener("change", (event) => show(Number(event.target.value)));
    element("labels").addEventListener("change", (event) => {
      state.labels = event.target.value;
      const set = data.sets[currentSet()];
      if (byLoss(set)) setThreshold(set.threshold);
      relabel();
    });
    element("colour").addEventListener("change", (event) => {
      state.colour = event.target.value;
      tint();
    });
    element("threshold").addEventListener("input", (event) => slide(Number(event.target.value)));
    element("search").addEventListener("input", (event) => search(event.target.value));
    element("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && state.hits.length) go(state.hit + (event.shiftKey ? -1 : 1));
    });
    element("help-button").addEventListener("click", () => element("help").showModal());
    element("help-close").addEventListener("click", () => element("help").close());
    const text = element("text");
    text.addEventListener("pointerover", (event) => event.pointerType === "mouse" && pieceOf(event) !== null && signals(pieceOf(event)));
    text.addEventListener("pointerleave", () => signals(state.pinned));
    text.addEventListener("click", (event) => pin(pieceOf(event) === state.pinned ? null : pieceOf(event)));
    document.addEventListener("keydown", onKey);
  }

  fillLabels();
  fillColours();
  fillSlider();
  element("most").hidden = !(data.sets.length || scored);
  listDocuments();
  tellPicked();
  const order = documents.map((doc, at) => [shareOf(doc), at]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  element("reader").hidden = false;
  show(order[0][1]);
  listen();
}

if (element("reader")) {
  unpack(element("data").textContent).then(reader).catch((error) => {
    const failed = make("p", `The documents cannot be shown: ${error.message}`, "note");
    failed.setAttribute("role", "alert");
    element("read").append(failed);
    throw error;
  });
}
