// Files that hold a talk or a picture, each complete in itself.

import { make } from "./dom.js";

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
  const shown = element.cloneNode(true);
  shown.querySelectorAll("button, fieldset").forEach((one) => one.remove());
  const style = await (await fetch(new URL("style.css", import.meta.url))).text();
  const { theme = "" } = document.documentElement.dataset;
  return `<!doctype html>
<html lang="en" data-theme="${theme}">
<head><meta charset="utf-8">${make("title", "", title).outerHTML}<style>${style}</style></head>
<body class="file">${make("h2", "", title).outerHTML}${shown.outerHTML}${make("p", "note", note).outerHTML}</body>
</html>
`;
}
