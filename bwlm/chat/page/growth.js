// Text that grows in an element, at its end or at its front.
//
// A browser breaks lines from the beginning, so each word put in front would move all that follow. While text grows at
// its front, its lines are therefore broken from the end: only the first line changes, at its left, and what has been
// written stays in place.

import { make } from "./dom.js";

export class Growth {
  constructor(element, isAtFront) {
    this.element = element;
    this.isAtFront = isAtFront;
    this.text = "";
    this.caret = make("span", "caret");
    this.words = document.createTextNode("");
    this.head = isAtFront ? make("span", "head") : element;
    if (isAtFront) element.append(this.head);
    this.head.append(...(isAtFront ? [this.caret, this.words] : [this.words, this.caret]));
    element.classList.add("growing");
  }

  add(text) {
    this.text = this.isAtFront ? text + this.text : this.text + text;
    this.words.data = this.isAtFront ? text + this.words.data : this.text;
    if (this.isAtFront) this.settleLines();
  }

  /** Move lines below the head, until the head is one line. */
  settleLines() {
    for (let cut = this.lineBreak(); cut > 0; cut = this.lineBreak()) {
      this.head.after(make("span", "line", this.words.data.slice(cut)));
      this.words.data = this.words.data.slice(0, cut);
    }
  }

  /** Return where the last line of the head begins; 0 if it has one line. */
  lineBreak() {
    const text = this.words.data;
    const paragraph = text.slice(0, -1).lastIndexOf("\n") + 1; // a line that is only begun stays
    if (paragraph > 0 && this.fits(paragraph)) return paragraph;
    if (this.fits(0)) return 0;
    const fitting = (at) => at > paragraph && this.fits(at);
    return [...text.matchAll(/\s(?=\S)/g)].map((match) => match.index + 1).find(fitting)
      ?? [...text.matchAll(/./gsu)].map((match) => match.index).find(fitting) ?? 0;
  }

  fits(start) {
    const range = document.createRange();
    range.setStart(this.words, start);
    range.setEnd(this.words, this.words.length);
    return range.getBoundingClientRect().width <= this.head.clientWidth - this.caret.offsetWidth;
  }
}
