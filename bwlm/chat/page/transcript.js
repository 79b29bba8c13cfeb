// Draws what was said, in the order of time: messages, or one document.

import { make, makeButton } from "./dom.js";
import { Growth } from "./growth.js";
import { ARROWS } from "./talk.js";

/** Draw a talk into an element. `copy`, if given, is called with the text that a person wants to copy. */
export function draw(element, talk, copy) {
  element.replaceChildren(...(talk.isDocument ? [sheet(talk, copy)] : talk.inOrder.map((turn) => message(turn, copy))));
}

/** Draw a talk with room for the model's next text, and return that text as it grows. */
export function drawGrowing(element, talk, reading) {
  draw(element, talk);
  const isFirst = talk.isAtFront(reading);
  if (talk.isDocument) {
    const text = make("span", "model");
    element.querySelector(".sheet")[isFirst ? "prepend" : "append"](text);
    return new Growth(text, isFirst);
  }
  const item = message({ speaker: "model", text: "", reading });
  element[isFirst ? "prepend" : "append"](item);
  return new Growth(item.querySelector(".text"), reading === "backward");
}

function sheet(talk, copy) {
  const text = make("div", "sheet");
  for (const { turn, joint } of talk.pieces) text.append(joint, make("span", turn.speaker, turn.text));
  const item = make("article", "turn document");
  item.ariaLabel = "Document; what you wrote is bold";
  item.append(text, label(notes(talk.last).join(" · "), talk.text, copy));
  return item;
}

function message(turn, copy) {
  const isModel = turn.speaker === "model";
  const item = make("article", `turn ${turn.speaker}`);
  item.ariaLabel = isModel ? `Model, ${turn.reading}` : "You";
  item.append(make("div", "text", turn.text));
  if (isModel) item.append(label(`${ARROWS[turn.reading]} ${[turn.reading, ...notes(turn)].join(" · ")}`, turn.text, copy));
  return item;
}

function notes({ note, seed }) {
  return [note, seed !== undefined && `seed ${seed}`].filter(Boolean);
}

function label(about, text, copy) {
  const element = make("div", "label", about);
  if (copy) element.append(makeButton("Copy", "Copy this text", () => copy(text)));
  return element;
}
