// Files that hold a talk or a picture, each complete in itself.

/** Let the browser save a file. */
export function save(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** Return a page of one file, with what an element shows and the page's own style. */
export async function asPage(title, note, element) {
  const page = document.implementation.createHTMLDocument(title);
  const shown = element.cloneNode(true);
  shown.querySelectorAll("button, fieldset").forEach((one) => one.remove());
  shown.querySelectorAll("select").forEach((one) => one.replaceWith(one.value));
  const style = page.createElement("style");
  style.textContent = (await (await fetch(new URL("style.css", import.meta.url))).text()) + "body { display: block; height: auto; padding: 1.5rem; }";
  const heading = page.createElement("h2");
  heading.textContent = title;
  const footer = page.createElement("p");
  footer.className = "note";
  footer.textContent = note;
  const charset = page.createElement("meta");
  charset.setAttribute("charset", "utf-8");
  page.documentElement.lang = "en";
  page.documentElement.dataset.theme = document.documentElement.dataset.theme ?? "";
  page.head.prepend(charset);
  page.head.append(style);
  page.body.append(heading, shown, footer);
  return `<!doctype html>\n${page.documentElement.outerHTML}`;
}
