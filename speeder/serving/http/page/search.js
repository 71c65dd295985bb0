// A combobox over the server's search: typed words, arrow keys, Enter, Escape, or the pointer.

import { get } from "./api.js";
import { cover, element, name } from "./dom.js";

const WAIT = 120; // milliseconds without typing before the server is queried

export function searchBox(input, list, status, onPick) {
  let hits = [];
  let active = -1;
  let timer = 0;
  let shown = ""; // the query that the hits are of
  let request = new AbortController();

  function show(items) {
    hits = items;
    list.replaceChildren(...items.map((item, place) => {
      const option = element("li", { id: `hit-${place}`, role: "option", "aria-selected": "false" });
      option.append(cover(item, true), element("span", { textContent: name(item) }));
      option.addEventListener("pointerdown", (event) => {
        event.preventDefault(); // the input keeps the focus
      });
      option.addEventListener("click", () => pick(place));
      return option;
    }));
    list.hidden = items.length === 0;
    input.setAttribute("aria-expanded", String(items.length > 0));
    activate(items.length ? 0 : -1);
  }

  function activate(place) {
    active = place;
    [...list.children].forEach((option, other) => option.setAttribute("aria-selected", String(other === place)));
    if (place < 0) {
      input.removeAttribute("aria-activedescendant");
    } else {
      input.setAttribute("aria-activedescendant", `hit-${place}`);
      list.children[place].scrollIntoView({ block: "nearest" });
    }
  }

  function close() {
    clearTimeout(timer);
    request.abort();
    show([]);
    status.textContent = "";
  }

  function pick(place) {
    const item = hits[place];
    input.value = "";
    close();
    input.focus();
    onPick(item);
  }

  async function search() {
    request.abort();
    request = new AbortController();
    const query = input.value.trim();
    if (!query) return close();
    try {
      const found = await get("v1/items", { q: query, limit: 8 }, request.signal);
      shown = query;
      show(found.items);
      const count = found.items.length;
      status.textContent = count ? "" : `No item matches “${query}”.`;
    } catch (error) {
      if (error.name === "AbortError") return;
      show([]);
      status.textContent = error.message;
    }
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, WAIT);
  });
  input.addEventListener("keydown", async (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && input.value.trim() !== shown) {
      event.preventDefault();
      clearTimeout(timer);
      await search(); // the hits are those of an earlier query
      if (input.value.trim() !== shown) return;
    }
    if (!hits.length) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      activate((active + step + hits.length) % hits.length);
    } else if (event.key === "Enter") {
      event.preventDefault();
      pick(active);
    }
  });
  input.addEventListener("blur", () => close());
}
