// The view in which a person and one model write in turn.

import { byId, make, say } from "./dom.js";
import { connectSettings, drawSettings, openers, settings } from "./settings.js";
import { asPage, save } from "./share.js";
import { ARROWS, Talk, describe } from "./talk.js";
import { draw, drawGrowing } from "./transcript.js";
import { receive } from "./writing.js";

const KEY = "bwlm.chat"; // talks outlive a reload, and end with the tab

export class Chat {
  constructor(models) {
    this.models = models;
    this.kept = JSON.parse(sessionStorage.getItem(KEY)) ?? { talks: {} };
    this.running = null;
    this.followed = true;
    this.input = byId("input");
    this.fillPicker();
    this.connect();
    this.choose(models.some(({ id }) => id === this.kept.model) ? this.kept.model : models[0].id);
  }

  // ---- what is chosen ----

  fillPicker() {
    byId("model").append(...this.models.map(({ id, direction }) => new Option(`${ARROWS[direction]} ${id}`, id)));
  }

  choose(id) {
    const model = this.models.find((one) => one.id === id);
    byId("model").value = id;
    this.talk = new Talk(model, this.kept.talks[id] ?? []);
    byId("facts").textContent = facts(model);
    byId("readings").hidden = model.readings.length < 2;
    const reading = model.readings.includes(this.kept.reading) ? this.kept.reading : model.readings[0];
    document.querySelector(`input[name=reading][value=${reading}]`).checked = true;
    say(byId("status"), "");
    this.draw();
  }

  get reading() { return document.querySelector("input[name=reading]:checked").value; }

  keep() {
    const talks = { ...this.kept.talks, [this.talk.model.id]: this.talk.turns };
    this.kept = { model: this.talk.model.id, reading: this.reading, talks };
    sessionStorage.setItem(KEY, JSON.stringify(this.kept));
  }

  // ---- what a person does ----

  connect() {
    byId("model").addEventListener("change", ({ target }) => this.choose(target.value));
    byId("readings").addEventListener("change", () => this.draw());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("input", () => this.enable());
    byId("stop").addEventListener("click", () => this.stop());
    byId("retry").addEventListener("click", () => this.retry());
    byId("clear").addEventListener("click", () => this.clear());
    byId("scroll").addEventListener("scroll", () => { this.followed = this.caretShows(); });
    byId("share").addEventListener("close", ({ target }) => this.share(target.returnValue));
    openers("share").forEach((opener) => opener.addEventListener("click", () => {
      byId("share").returnValue = "";
      byId("share").showModal();
    }));
    connectSettings();
  }

  get canGoOn() { return this.talk.isDocument && this.talk.turns.length > 0; }

  async send() {
    const typed = this.input.value;
    const { reading } = this;
    if (this.running || !(typed.trim() || this.canGoOn)) return;
    const before = [...this.talk.turns];
    if (typed.trim()) this.talk.turns.push({ speaker: "person", text: typed, reading });
    this.input.value = "";
    if (!(await this.write(reading, before))) this.input.value ||= typed;
    this.enable();
  }

  async retry() {
    if (this.running || this.talk.last?.speaker !== "model") return;
    const before = [...this.talk.turns];
    await this.write(this.talk.turns.pop().reading, before);
  }

  stop() { this.running?.abort(); }

  clear() {
    this.talk.turns = [];
    say(byId("status"), "");
    this.draw();
    this.input.focus();
  }

  async share(format) {
    const { model, turns, text } = this.talk;
    const title = `${ARROWS[model.direction]} ${model.id}`;
    if (format === "txt") save(`${model.id}.txt`, "text/plain", text);
    if (format === "json") save(`${model.id}.json`, "application/json", JSON.stringify({ model, settings: settings(), turns, text }, null, 2));
    if (format === "html") save(`${model.id}.html`, "text/html", await asPage(title, facts(model), byId("transcript")));
  }

  async copy(text) {
    await navigator.clipboard.writeText(text);
    say(byId("status"), "Copied.");
  }

  // ---- what the model writes ----

  /** Let the model write its next turn. Return false, with the turns as they were before, if it wrote nothing. */
  async write(reading, before) {
    const { talk } = this;
    const drawn = drawSettings(talk.model);
    const body = { model: talk.model.id, direction: reading, messages: talk.messages(reading), ...drawn };
    this.running = new AbortController();
    this.followed = true;
    this.growth = drawGrowing(byId("transcript"), talk, reading);
    this.enable();
    this.follow();
    const tell = (text) => say(byId("status"), text);
    try {
      const answer = await receive(body, this.growth, this.running.signal, tell, () => this.follow());
      talk.turns.push({ speaker: "model", reading, seed: drawn.seed, ...answer });
      tell("");
      byId("announcer").textContent = answer.text;
      return true;
    } catch (error) {
      talk.turns = before;
      say(byId("status"), error.name === "AbortError" ? "Stopped before the first word." : error.message, error.name !== "AbortError");
      return false;
    } finally {
      this.running = null;
      this.draw();
      this.show(reading);
    }
  }

  // ---- what is shown ----

  draw() {
    this.keep();
    const what = describe(this.talk.model.manners[this.reading], this.reading);
    if (this.talk.turns.length) draw(byId("transcript"), this.talk, (text) => this.copy(text));
    else byId("transcript").replaceChildren(empty(what));
    this.input.placeholder = this.canGoOn ? "Write more, or send nothing and let it go on" : what.placeholder;
    this.enable();
  }

  enable() {
    const isRunning = this.running !== null;
    const isTyped = this.input.value.trim() !== "";
    byId("send").disabled = !(isRunning || isTyped || this.canGoOn);
    byId("send").textContent = this.canGoOn && !isTyped ? "Go on" : "Send";
    swap(isRunning ? byId("send") : byId("stop"), isRunning ? byId("stop") : byId("send"), this.input);
    byId("retry").disabled = isRunning || this.talk.last?.speaker !== "model";
    byId("clear").disabled = isRunning || !this.talk.turns.length;
    byId("model").disabled = byId("readings").disabled = isRunning;
    openers("share").forEach((opener) => { opener.disabled = isRunning || !this.talk.turns.length; });
  }

  /** Keep the place where the text grows in view, unless the person scrolled away from it. */
  follow() {
    if (this.followed) this.growth.caret.scrollIntoView({ block: "nearest" });
  }

  caretShows() {
    if (!this.running) return true;
    const caret = this.growth.caret.getBoundingClientRect();
    const view = byId("scroll").getBoundingClientRect();
    return caret.bottom > view.top && caret.top < view.bottom;
  }

  /** Show the side at which the text has just grown. */
  show(reading) {
    if (this.followed) byId("scroll").scrollTop = this.talk.isAtFront(reading) ? 0 : byId("scroll").scrollHeight;
  }
}

/** Show a button in the place of another, with its focus; where it cannot have it, `fallback` has. */
function swap(hidden, shown, fallback) {
  const hadFocus = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (hadFocus) (shown.disabled ? fallback : shown).focus();
}

/** Return what a model is, in one line. */
export function facts({ direction, phase, depth, parameters }) {
  const size = parameters >= 1e6 ? `${(parameters / 1e6).toFixed(1)} M` : `${(parameters / 1e3).toFixed(0)} k`;
  return `${ARROWS[direction]} ${direction} · ${phase} · depth ${depth} · ${size} parameters`;
}

function empty({ title, sentence }) {
  const element = make("div", "empty");
  element.append(make("h2", "", title), make("p", "", sentence));
  return element;
}
