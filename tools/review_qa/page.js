"use strict";
// The state is {question id: {verdict, note}}; the page is drawn from it, and it is all that is kept.
const key = document.body.dataset.key;
const pairs = [...document.querySelectorAll(".pair")];
const told = document.getElementById("told"), show = document.getElementById("show");
let current = -1, state = new Map();

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(key) || "{}");
    localStorage.setItem(key, JSON.stringify(found));  // where nothing can be kept this fails
    state = new Map(Object.entries(found));
  } catch {
    document.getElementById("unsaved").hidden = false;
  }
}

function keep() {
  try {
    localStorage.setItem(key, JSON.stringify(Object.fromEntries(state)));
  } catch {
    document.getElementById("unsaved").hidden = false;
  }
}

const of = (pair) => state.get(pair.dataset.id) || {verdict: "", note: ""};

function set(pair, change) {
  const next = {...of(pair), ...change};
  if (next.verdict || next.note) state.set(pair.dataset.id, next);
  else state.delete(pair.dataset.id);
  keep();
  draw(pair);
  count();
}

function draw(pair) {
  const {verdict, note} = of(pair);
  pair.dataset.verdict = verdict;
  for (const button of pair.querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button.value === verdict));
  const field = pair.querySelector("textarea");
  if (field !== document.activeElement) field.value = note;
}

function count() {
  const verdicts = pairs.map((pair) => of(pair).verdict);
  const n = (word) => verdicts.filter((v) => v === word).length;
  const done = verdicts.filter(Boolean).length;
  document.getElementById("progress").value = done;
  told.textContent = `${done} of ${pairs.length} reviewed: ${n("keep")} keep, ${n("discard")} discard, ${n("unsure")} unsure`;
}

function filter() {
  for (const pair of pairs) {
    const {verdict} = of(pair);
    pair.hidden = show.value !== "all" && (show.value === "open" ? verdict !== "" : verdict !== show.value);
  }
  for (const card of document.querySelectorAll(".card"))
    card.hidden = ![...card.querySelectorAll(".pair")].some((pair) => !pair.hidden);
}

function mark(number) {
  if (pairs[current]) pairs[current].removeAttribute("aria-current");
  current = number;
  pairs[current].setAttribute("aria-current", "true");
}

function go(step) {
  let to = current + step;
  while (pairs[to] && pairs[to].hidden) to += step;
  if (!pairs[to]) return;
  pairs[to].focus({preventScroll: true});
  pairs[to].scrollIntoView({block: "nearest"});
}

function judge(pair, verdict) {
  const again = of(pair).verdict === verdict;
  set(pair, {verdict: again ? "" : verdict});
  return !again;
}

pairs.forEach((pair, number) => {
  pair.addEventListener("focusin", () => mark(number));
  pair.querySelector("textarea").addEventListener("input", (e) => set(pair, {note: e.target.value}));
  for (const button of pair.querySelectorAll("button"))
    button.addEventListener("click", () => judge(pair, button.value));
});

document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const writes = e.target.matches("textarea, select, input");
  if (e.key === "Escape" && writes && pairs[current]) { pairs[current].focus(); return; }
  if (writes) return;
  const verdict = {k: "keep", d: "discard", u: "unsure"}[e.key.toLowerCase()];
  const pair = pairs[current];
  if (verdict && pair) { if (judge(pair, verdict)) go(1); }
  else if (e.key.toLowerCase() === "x" && pair) set(pair, {verdict: ""});
  else if (e.key.toLowerCase() === "t" && pair) pair.querySelector("textarea").focus();
  else if (["n", "N", "ArrowDown"].includes(e.key)) go(1);
  else if (["p", "P", "ArrowUp"].includes(e.key)) go(-1);
  else return;
  e.preventDefault();
});

// A cell that a spreadsheet would run as a formula gets an apostrophe in front; the reader takes it off.
const cell = (text) => '"' + (/^[=+\-@'\t\r]/.test(text) ? "'" + text : text).replaceAll('"', '""') + '"';

function csv() {
  const lines = [["question_id", "verdict", "note", "pair"].join(",")];
  for (const pair of pairs) {
    const {verdict, note} = of(pair);
    if (verdict || note) lines.push([pair.dataset.id, verdict, note, pair.dataset.pair].map(cell).join(","));
  }
  return "\ufeff" + lines.join("\r\n") + "\r\n";
}

document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  link.download = `review_${document.body.dataset.name.replace(/\.[^.]*$/, "")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
show.addEventListener("change", filter);
load();
pairs.forEach(draw);
count();
if (pairs.length) mark(0);
