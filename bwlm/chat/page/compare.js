// The view in which two models, or two directions of one, read and write on from the same text side by side.

import { score } from "./api.js";
import { byId, make, say } from "./dom.js";
import { drawSettings } from "./settings.js";
import { asPage, save } from "./share.js";
import { aligned, figure, pieces } from "./surprise.js";
import { ARROWS, Talk } from "./talk.js";
import { draw, drawGrowing } from "./transcript.js";
import { receive } from "./writing.js";

const MOST_SURPRISE = 12; // bits at the end of the scale, the same for all texts and models
const MOST_DIFFERENCE = 6;
const KEY = "bwlm.compare";
const LEGENDS = {
  surprise: { label: "Surprise of a token, in bits", ticks: ["0", "3", "6", "9", "12 or more"] },
  difference: { label: "Surprise minus that of the other side, in bits", ticks: ["−6 or less", "−3", "0", "3", "6 or more"] },
};

export class Compare {
  constructor(models) {
    this.voices = models.flatMap((model) => model.readings.map((reading) => ({ model, reading })));
    this.sides = ["left", "right"].map((name) => ({ select: byId(name), element: byId(name).closest(".side") }));
    this.text = byId("compare-text");
    this.running = null;
    this.scores = null;
    this.restore();
    this.connect();
    this.enable();
  }

  // ---- what is chosen ----

  restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
    const names = this.voices.map(({ model, reading }) => `${ARROWS[reading]} ${model.id}`);
    this.sides.forEach(({ select }, at) => {
      select.append(...names.map((name, index) => new Option(name, index)));
      select.value = names.includes(kept.sides?.[at]) ? names.indexOf(kept.sides[at]) : Math.min(at, names.length - 1);
    });
    this.text.value = kept.text ?? "";
    if (this.voices.length < 2) this.say("There is one model in one direction. To compare, start the server with two: bwlm serve ID ID");
  }

  keep() {
    const sides = this.sides.map(({ select }) => select.selectedOptions[0].text);
    sessionStorage.setItem(KEY, JSON.stringify({ text: this.text.value, sides }));
  }

  voice(side) { return this.voices[side.select.value]; }

  // ---- what a person does ----

  connect() {
    byId("compare-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run(() => this.score());
    });
    byId("write").addEventListener("click", () => this.run(() => this.write()));
    byId("compare-stop").addEventListener("click", () => this.stop());
    this.text.addEventListener("input", () => this.changed());
    this.sides.forEach(({ select }) => select.addEventListener("change", () => this.changed()));
    byId("scale").addEventListener("change", () => this.draw());
    byId("save-picture").addEventListener("click", () => this.savePicture());
    byId("save-values").addEventListener("click", () => this.saveValues());
    this.sides.forEach(({ element }) => this.connectPieces(element.querySelector(".text")));
  }

  connectPieces(text) {
    text.addEventListener("pointerover", ({ target }) => target.dataset.at && this.point(Number(target.dataset.at)));
    text.addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (step && this.shown) this.point((this.here ?? (step > 0 ? -1 : this.shown[0].length)) + step);
    });
  }

  changed() {
    this.keep();
    if (this.scores) this.forget();
    this.enable();
  }

  stop() { this.running?.abort(); }

  /** Do something that can be stopped, and say why if it fails. */
  async run(action) {
    if (this.running || !this.text.value.trim()) return;
    this.running = new AbortController();
    this.forget();
    this.keep();
    this.enable();
    try {
      await action();
      this.say("");
    } catch (error) {
      this.say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
    } finally {
      this.running = null;
      this.enable();
    }
  }

  async score() {
    this.say("Reading the text …");
    this.scores = await Promise.all(this.sides.map((side) => {
      const { model, reading } = this.voice(side);
      return score(model.id, reading, this.text.value, this.running.signal);
    }));
    this.draw();
  }

  async write() {
    const { seed } = drawSettings(this.voices[0].model); // the same on both sides
    const { signal } = this.running;
    await Promise.all(this.sides.map((side) => this.writeSide(side, seed, signal)));
  }

  async writeSide(side, seed, signal) {
    const { model, reading } = this.voice(side);
    const text = side.element.querySelector(".text");
    const talk = new Talk(model, [{ speaker: "person", text: this.text.value, reading }]);
    const body = { model: model.id, direction: reading, messages: talk.messages(reading), ...drawSettings(model), seed };
    const answer = await receive(body, drawGrowing(text, talk, reading), signal, (what) => this.say(what));
    talk.turns.push({ speaker: "model", reading, seed, ...answer });
    draw(text, talk);
    byId("announcer").textContent = `${model.id}, ${reading}: ${answer.text}`;
  }

  // ---- what is shown ----

  say(text, isFault = false) { say(byId("compare-status"), text, isFault); }

  enable() {
    const isRunning = this.running !== null;
    byId("compare-stop").hidden = !isRunning;
    byId("score").disabled = byId("write").disabled = isRunning || !this.text.value.trim();
    byId("save-picture").disabled = byId("save-values").disabled = !this.scores;
    this.sides.forEach(({ select }) => { select.disabled = isRunning; });
  }

  forget() {
    this.scores = this.shown = this.here = null;
    for (const id of ["scale", "readout", "values"]) byId(id).hidden = true;
    for (const { element } of this.sides) {
      element.querySelector(".figure").textContent = "";
      element.querySelector(".text").replaceChildren();
      element.querySelector(".text").removeAttribute("tabindex");
    }
  }

  get colours() { return document.querySelector("input[name=colours]:checked").value; }

  draw() {
    this.shown = aligned(...this.scores.map(pieces));
    this.here = null;
    this.sides.forEach((side, at) => this.drawSide(side, at));
    byId("legend").replaceChildren(...legend(LEGENDS[this.colours]));
    byId("legend").className = `legend ${this.colours}`;
    byId("readout").textContent = "Point at a token, or move through the text with the arrow keys.";
    byId("values").querySelector(".table").replaceChildren(table(this.rows));
    for (const id of ["scale", "readout", "values"]) byId(id).hidden = false;
  }

  drawSide({ element }, at) {
    const [own, other] = [this.shown[at], this.shown[1 - at]];
    const characters = [...this.scores[at].text];
    const isDifference = this.colours === "difference";
    element.querySelector(".figure").replaceChildren(...figureLine(figure(this.scores[at])));
    const text = element.querySelector(".text");
    text.tabIndex = 0;
    text.role = "group";
    text.ariaLabel = "Text, each token coloured; arrow keys move through it";
    text.replaceChildren(...own.map((piece, index) => {
      const value = isDifference ? difference(piece, other[index]) : piece.bits;
      return span(characters.slice(piece.start, piece.end).join(""), index, value, isDifference ? MOST_DIFFERENCE : MOST_SURPRISE);
    }));
  }

  /** Return the pieces with the bits of both sides: [text, left, right]. */
  get rows() {
    const characters = [...this.scores[0].text];
    const [left, right] = this.shown;
    return left.map(({ start, end, bits }, at) => [characters.slice(start, end).join(""), bits, right[at].bits]);
  }

  /** Mark a token on both sides, and tell its values. */
  point(at) {
    const row = this.rows[at];
    if (!row) return;
    this.here = at;
    const [text, left, right] = row;
    for (const { element } of this.sides) {
      element.querySelector(".here")?.classList.remove("here");
      element.querySelector(".text").children[at].classList.add("here");
    }
    byId("readout").replaceChildren(make("q", "", visible(text)), ` left ${inBits(left)} · right ${inBits(right)} · difference ${inBits(minus(left, right))}`);
  }

  // ---- files ----

  get title() { return this.sides.map(({ select }) => select.selectedOptions[0].text).join("  |  "); }

  async savePicture() {
    const shown = byId("picture").cloneNode(true);
    shown.querySelectorAll("select").forEach((select, at) => select.replaceWith(this.sides[at].select.selectedOptions[0].text));
    shown.querySelector(".readout").remove();
    save("surprise.html", "text/html", await asPage("Surprise in two readings", this.title, shown));
  }

  saveValues() {
    const sides = this.sides.map((side, at) => {
      const { model, reading } = this.voice(side);
      return { model: model.id, reading, ...this.scores[at], bits_per_byte: figure(this.scores[at]).perByte };
    });
    save("surprise.json", "application/json", JSON.stringify({ text: this.text.value, sides }, null, 2));
  }
}

const minus = (a, b) => (a === null || b === null ? null : a - b);
const difference = (one, other) => minus(one.bits, other?.bits ?? null);
const inBits = (bits) => (bits === null ? "not scored" : `${bits.toFixed(2).replace("-", "−")} bits`);
const visible = (text) => text.replaceAll("\n", "↵");

function span(text, at, value, most) {
  const element = make("span", "piece", text);
  element.dataset.at = at;
  if (value === null) element.classList.add("unscored");
  else {
    element.classList.toggle("less", value < 0);
    element.style.setProperty("--share", `${Math.min(100, (100 * Math.abs(value)) / most).toFixed(1)}%`);
    element.title = inBits(value);
  }
  return element;
}

function figureLine({ perByte, bits, tokens }) {
  if (perByte === null) return ["nothing scored"];
  return [make("strong", "", perByte.toFixed(3)), ` bits per byte · ${(bits / tokens).toFixed(2)} bits per token · ${tokens} tokens`];
}

function legend({ label, ticks }) {
  const row = make("div", "ticks");
  row.append(...ticks.map((tick) => make("span", "", tick)));
  return [make("span", "", label), make("div", "ramp"), row];
}

function table(rows) {
  const element = make("table");
  const cells = (tag, texts) => {
    const row = make("tr");
    row.append(...texts.map((text) => make(tag, "", text)));
    return row;
  };
  const bits = (value) => (value === null ? "–" : value.toFixed(2));
  element.append(cells("th", ["token", "left", "right", "left − right"]));
  element.append(...rows.map(([text, left, right]) => cells("td", [visible(text), bits(left), bits(right), bits(minus(left, right))])));
  return element;
}
