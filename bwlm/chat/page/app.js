// The page: loads the models, shows one of two views, and serves the keys that work everywhere.

import { keepToken, models } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { byId } from "./dom.js";

const VIEWS = ["chat", "compare"];

async function begin() {
  show("loading");
  try {
    const found = await models();
    const views = { chat: new Chat(found), compare: new Compare(found) };
    addEventListener("hashchange", () => showView());
    connectKeys(views);
    showView();
  } catch (error) {
    fail(error);
  }
}

function fail(error) {
  byId("failure").textContent = error.status === 401 ? "It asks for its token." : error.message;
  byId("token-form").hidden = error.status !== 401;
  byId("reload").hidden = error.status === 401;
  show("failed");
}

function show(id) {
  document.querySelectorAll("main").forEach((main) => { main.hidden = main.id !== id; });
}

const view = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0]);

function showView() {
  show(view());
  for (const one of VIEWS) {
    byId(`to-${one}`).ariaCurrent = one === view() ? "page" : "false";
  }
  field().focus();
}

const field = () => byId(view() === "chat" ? "input" : "compare-text");

function connectKeys(views) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") views[view()].stop();
    if (event.key === "/" && !event.target.matches("input, textarea, select")) {
      event.preventDefault();
      field().focus();
    }
  });
}

function toggleTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("bwlm.theme", root.dataset.theme);
}

byId("theme").addEventListener("click", toggleTheme);
byId("reload").addEventListener("click", () => location.reload());
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(byId("token").value);
  location.reload();
});
begin();
