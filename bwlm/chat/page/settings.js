// How the model writes: kept in this browser, sent with each request.

import { byId } from "./dom.js";

const KEY = "bwlm.settings";
const DEFAULTS = { temperature: 0.6, top_k: 50, max_tokens: 256 }; // those of the terminal

/** Return the settings that a person chose. */
export function settings() {
  return JSON.parse(localStorage.getItem(KEY)) ?? DEFAULTS;
}

/** Return the settings for one answer of a model, with a seed of its own, so that the answer can be repeated. */
export function drawSettings({ sequence_length: context }) {
  const { max_tokens: tokens, ...chosen } = settings();
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return { seed, ...chosen, ...(tokens && { max_tokens: Math.min(tokens, context) }) };
}

export function connectSettings() {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const inputs = [...form.querySelectorAll("input")];
  const fill = (values) => inputs.forEach((input) => { input.value = values[input.name] ?? ""; });
  const values = () => inputs.filter((input) => input.value !== "").map((input) => [input.name, input.valueAsNumber]);
  openers("settings").forEach((opener) => opener.addEventListener("click", () => {
    fill(settings());
    dialog.showModal();
  }));
  byId("defaults").addEventListener("click", () => fill(DEFAULTS));
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value !== "leave") localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(values())));
  });
}

/** Return the buttons that open a dialog. */
export const openers = (id) => document.querySelectorAll(`[data-opens="${id}"]`);
