// A recommended item as a card: its picture, the modalities' weights, and the effect of each pick.

import { cover, element, name } from "./dom.js";

const KNOWN = {
  text: ["Text", "var(--text-share)"],
  image: ["Image", "var(--image-share)"],
  collaborative: ["Collaborative", "var(--collaborative-share)"],
  item: ["Item embedding", "var(--item-share)"],
};
const SHOWN = 3; // picks listed before the card is opened

function modality(key, place) {
  return KNOWN[key] ?? [key, `hsl(${(200 + 70 * place) % 360} 55% 50%)`];
}

export function legend(names) {
  return names.map((key, place) => {
    const [label, colour] = modality(key, place);
    const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = colour;
    return element("li", {}, swatch, label);
  });
}

export function card(item, onPick) {
  const add = element("button", {
    class: "add", type: "button", textContent: "Pick", "aria-label": `Pick ${name(item)} too`,
  });
  add.addEventListener("click", () => onPick(item));
  const why = element("div", { class: "why" });
  const body = element(
    "div", { class: "card-body" },
    element("div", { class: "card-head" }, element("h3", { textContent: name(item) }), add),
    why,
  );
  const made = element("li", { class: "card" }, cover(item), body);
  made.dataset.id = item.id;
  return made;
}

// `largest`: the largest change among all cards, so that bars are comparable across cards.
export function fillWhy(made, explained, largest) {
  const effects = explained.history
    .filter((effect) => effect.change !== null)
    .sort((one, other) => Math.abs(other.change) - Math.abs(one.change));
  const rows = effects.map((effect) => effectRow(effect, largest));
  const rest = rows.slice(SHOWN);
  made.querySelector(".why").replaceChildren(
    element("h4", { textContent: "Modality weights" }),
    shareBar(explained.gates),
    element("h4", { textContent: "Effect of your picks" }),
    rows.length
      ? element("ul", { class: "effects" }, ...rows.slice(0, SHOWN))
      : element("p", { class: "quiet", textContent: "Pick one more item to compare." }),
    ...(rest.length
      ? [element("details", {}, element("summary", { textContent: `${rest.length} more` }),
          element("ul", { class: "effects" }, ...rest))]
      : []),
  );
}

function shareBar(gates) {
  const parts = Object.entries(gates).map(([key, share], place) => [...modality(key, place), share]);
  const bar = element("div", { class: "shares", role: "img" });
  const words = [];
  for (const [label, colour, share] of parts) {
    const percent = Math.round(100 * share);
    words.push(`${label} ${percent} %`);
    if (percent < 1) continue;
    const part = element("span", { title: `${label} ${percent} %` });
    if (percent >= 14) part.textContent = `${percent} %`;
    part.style.flexGrow = share;
    part.style.background = colour;
    bar.append(part);
  }
  bar.setAttribute("aria-label", words.join(", "));
  return bar;
}

function effectRow(effect, largest) {
  const bar = element("span", { class: effect.change < 0 ? "bar against" : "bar", "aria-hidden": "true" });
  bar.style.width = `${Math.max(2, (100 * Math.abs(effect.change)) / (largest || 1))}%`;
  const sign = effect.change < 0 ? "−" : "+";
  return element(
    "li", {},
    element("span", { class: "effect-title", textContent: name(effect), title: name(effect) }),
    element("span", { class: "track" }, bar),
    element("span", { class: "number", textContent: `${sign}${Math.abs(effect.change).toFixed(2)}` }),
  );
}
