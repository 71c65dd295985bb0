// Elements. Titles are only ever set as text, so that a title cannot be markup.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function name(item) {
  return item.title || `Item ${item.id}`;
}

// A picture, or where there is none (or it does not load) a drawn cover with the title.
export function cover(item, small = false) {
  const frame = element("div", { class: small ? "cover small" : "cover", "aria-hidden": "true" });
  const draw = () => {
    const title = name(item);
    let hash = 0;
    for (const letter of title) hash = Math.imul(hash, 31) + letter.codePointAt(0);
    frame.style.setProperty("--hue", (hash >>> 0) % 360);
    frame.classList.add("drawn");
    frame.replaceChildren(element("span", { textContent: small ? title.slice(0, 1) : title }));
  };
  if (item.picture) {
    const picture = element("img", { src: item.picture, alt: "", loading: "lazy", decoding: "async" });
    picture.addEventListener("error", draw, { once: true });
    frame.append(picture);
  } else {
    draw();
  }
  return frame;
}
