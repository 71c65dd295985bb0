// The page: picks, their recommendations, and the reasons. Picks are kept in the address, so that it can be shared.

import { get, post } from "./api.js";
import { card, fillWhy, legend } from "./cards.js";
import { cover, element, name } from "./dom.js";
import { searchBox } from "./search.js";

const COUNT = 12; // recommendations on the page
const at = (id) => document.getElementById(id);
let picks = [];
let about = null;
let request = new AbortController();

function readAddress() {
  const ids = location.hash.slice(1).split(",").filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return [...new Set(ids)].map((id) => ({ id, title: "", picture: null }));
}

function writeAddress() {
  const hash = picks.map((item) => encodeURIComponent(item.id)).join(",");
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function add(item) {
  if (picks.some((other) => other.id === item.id)) {
    at("search-status").textContent = `${name(item)} is already picked.`;
    return;
  }
  if (picks.length >= about.max_history) {
    at("search-status").textContent = `At most ${about.max_history} picks.`;
    return;
  }
  change([...picks, item]);
}

function remove(place) {
  change(picks.filter((_, other) => other !== place));
  const buttons = at("picked").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? at("query")).focus();
}

function change(next) {
  picks = next;
  writeAddress();
  drawPicks();
  recommend();
}

function drawPicks() {
  at("picked").replaceChildren(...picks.map((item, place) => {
    const button = element("button", { class: "remove", type: "button", textContent: "×",
      "aria-label": `Remove ${name(item)}` });
    button.addEventListener("click", () => remove(place));
    return element("li", {}, cover(item, true), element("span", { textContent: name(item) }), button);
  }));
  at("picks-hint").hidden = picks.length > 0;
  at("clear").hidden = picks.length < 2;
}

function clearCards() {
  at("cards").replaceChildren();
  for (const id of ["legend", "footnote", "problem"]) at(id).hidden = true;
}

function drawNothing() {
  clearCards();
  at("empty").hidden = false;
  at("status").textContent = "";
}

async function recommend() {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  if (!picks.length) return drawNothing();
  at("results").setAttribute("aria-busy", "true");
  at("empty").hidden = true;
  let drawn = false;
  try {
    const ids = picks.map((item) => item.id);
    const k = Math.min(COUNT, about.max_k, about.max_explained, about.items - picks.length);
    if (k < 1) throw new Error("You have picked every item.");
    const found = await post("v1/recommend", { history: ids, k }, signal);
    if (picks.some((item) => !item.title)) { // they came from the address
      picks = found.history;
      drawPicks();
    }
    drawCards(found);
    drawn = true;
    const why = await post("v1/explain", { history: ids, items: found.items.map((item) => item.id) }, signal);
    drawReasons(why.items);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!drawn) clearCards(); // the cards on the page are for other picks
    at("problem").textContent = error.message;
    at("problem").hidden = false;
    at("status").textContent = "";
  }
  if (!signal.aborted) at("results").removeAttribute("aria-busy");
}

function drawCards(found) {
  at("problem").hidden = true;
  at("cards").replaceChildren(...found.items.map((item) => card(item, add)));
  const read = found.read < found.history.length ? ` (the model reads the newest ${found.read})` : "";
  const count = found.history.length;
  at("status").textContent =
    `${found.items.length} for ${count === 1 ? "your pick" : `your ${count} picks`}${read}, best first`;
}

function drawReasons(items) {
  const changes = items.flatMap((item) => item.history.map((effect) => Math.abs(effect.change ?? 0)));
  const largest = Math.max(...changes);
  const cards = [...at("cards").children];
  items.forEach((item, place) => fillWhy(cards[place], item, largest));
  at("legend").replaceChildren(...legend(about.modalities));
  at("legend").hidden = at("footnote").hidden = false;
}

at("clear").addEventListener("click", () => {
  change([]);
  at("query").focus();
});
addEventListener("hashchange", () => {
  picks = readAddress();
  drawPicks();
  recommend();
});
try {
  about = await get("v1/model");
  at("about").textContent = `${about.name} · ${about.items.toLocaleString("en")} items`;
  searchBox(at("query"), at("hits"), at("search-status"), add);
  picks = readAddress();
  drawPicks();
  await recommend();
} catch (error) {
  at("problem").textContent = error.message;
  at("problem").hidden = false;
}
