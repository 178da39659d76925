"use strict";
// Every text of the log enters the page by textContent, never as markup.
const at = (id) => document.getElementById(id);
const KINDS = {
  again: () => "in the history already",
  taken_together: (why) => `taken beside ${why.title}`,
  similar: (why) => `${why.shared_levels} of ${why.levels} codes shared with ${why.title}`,
};
const SCORES = { popularity: "events", recent_popularity: "events", item_graph: "votes", title_words: "match" };
let person = null; // {user} or {history: [{item_id, title}]}
let asked = 0; // requests are numbered: a late answer never replaces a newer one

function element(tag, text, css) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (css) made.className = css;
  return made;
}

function button(text, label, act) {
  const made = element("button", text, "quiet");
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function complain(sentence) {
  at("fault").textContent = sentence || "";
  at("fault").hidden = !sentence;
}

async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the service does not answer; is it still running?");
  }
  const found = await answer.json();
  if (answer.status === 401) at("entry").hidden = false;
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function whom() {
  if (person === null) return {};
  return person.user === undefined ? { history: person.history.map((item) => item.item_id) } : { user: person.user };
}

function listItems(place, items, method) {
  const unit = SCORES[method] || "log-probability";
  place.replaceChildren(...items.map((item) => {
    const line = element("li");
    const name = element("div");
    const title = element("span", item.title, "title");
    if (item.title !== item.item_id) title.append(element("span", item.item_id, "id"));
    name.append(title);
    if (item.why) name.append(element("span", KINDS[item.why.kind](item.why), "why"));
    const score = element("span", Number.isInteger(item.score) ? item.score.toLocaleString("en") : item.score.toFixed(2), "score");
    score.title = unit;
    const add = button("add", `add ${item.title} to the history`, () => grow(item));
    line.append(element("span", item.rank, "rank"), name, score, add);
    return line;
  }));
}

function showHistory(items, length) {
  const edited = person !== null && person.history !== undefined;
  const count = length > items.length ? `The newest ${items.length} of ${length}` : `${length} ${length === 1 ? "item" : "items"}`;
  const note = `${count}, newest first${edited ? "; put together here" : ""}.`;
  at("history-note").textContent = items.length ? note : "Empty.";
  at("history").replaceChildren(...items.map((item, place) => {
    const line = element("li");
    line.append(element("span", item.title));
    line.append(button("×", `remove ${item.title} from the history`, () => {
      keep(items.filter((_, other) => other !== place));
    }));
    return line;
  }).reverse());
  at("clear").hidden = person === null;
}

let known = []; // the history last shown
function keep(items) {
  person = { history: items };
  at("user").value = "";
  refresh();
}

function grow(item) {
  keep([...known, { item_id: item.item_id, title: item.title }]);
}

async function recommend(turn) {
  if (person === null || (person.history && !person.history.length)) {
    known = [];
    showHistory([], 0);
    at("next-items").replaceChildren();
    at("next-note").textContent = "Choose a user, or search and add items to a history.";
    at("scale").hidden = true;
    return;
  }
  const reply = await call("/recommend", { ...whom(), k: 10 });
  if (turn !== asked) return;
  known = person.history || reply.history;
  showHistory(known, person.history ? known.length : reply.history_length);
  listItems(at("next-items"), reply.items, reply.method);
  const by = `${reply.method}; score: ${SCORES[reply.method] || "log-probability"}`;
  const reason = reply.reason && reply.reason[0].toUpperCase() + reply.reason.slice(1);
  at("next-note").textContent = reply.fallback ? `${reason}. Fallback: ${by}.` : `Ranked by ${by}.`;
  at("scale").hidden = !reply.items.some((item) => item.why);
}

async function search(turn) {
  const query = at("query").value.trim();
  at("found").hidden = !query;
  if (!query) return;
  const reply = await call("/search", { query, ...whom(), k: 10 });
  if (turn !== asked) return;
  listItems(at("found-items"), reply.items, reply.method);
  const words = reply.method === "title_words" ? "by the words of the titles; the history plays no part" : `by ${reply.method}`;
  at("found-note").textContent = reply.items.length ? `Ranked ${words}.` : "Nothing has a word of that in its title.";
}

function remember() {
  const query = at("query").value.trim();
  const place = new URLSearchParams();
  for (const [name, value] of Object.entries(whom())) for (const one of [value].flat()) place.append(name, one);
  if (query) place.set("query", query);
  history.replaceState(null, "", place.size ? `?${place}` : "/");
}

async function refresh() {
  asked += 1;
  const turn = asked;
  complain("");
  remember();
  const ends = await Promise.allSettled([recommend(turn), search(turn)]);
  const failed = ends.find((end) => end.status === "rejected");
  if (failed && turn === asked) complain(failed.reason.message);
}

function choose(user) {
  at("user").value = user;
  person = user ? { user } : null;
  refresh();
}

async function introduce() {
  const model = await call("/model");
  const number = (value) => value.toLocaleString("en");
  at("model").textContent = `${model.method}, seed ${model.seed}, after stage ${model.stage} `
    + `(${model.protocol.replace("_", "-")} training): ${number(model.items)} items, ${number(model.users)} users`;
  at("examples").replaceChildren("try", ...model.examples.map((user) => button(user, `show user ${user}`, () => choose(user))));
}

async function start() {
  const wanted = new URLSearchParams(location.search);
  at("query").value = wanted.get("query") || "";
  at("user").value = wanted.get("user") || "";
  if (wanted.has("user")) person = { user: wanted.get("user") };
  else if (wanted.has("history")) {
    person = { history: wanted.getAll("history").map((item) => ({ item_id: item, title: item })) };
  }
  try {
    await introduce();
    if (person && person.history) {
      person.history = await Promise.all(person.history.map(({ item_id }) => call(`/items/${encodeURIComponent(item_id)}`)));
    }
    if (person || at("query").value) await refresh();
  } catch (error) {
    complain(error.message);
  }
}

at("person").addEventListener("submit", (event) => { event.preventDefault(); choose(at("user").value.trim()); });
at("search").addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
at("query").addEventListener("input", () => { if (!at("query").value) refresh(); });
at("clear").addEventListener("click", () => choose(""));
at("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  at("entry").hidden = true;
  complain("");
  start();
});
start();
