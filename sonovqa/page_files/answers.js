// The eight answers: one card a question, filled in as the answer streams, then marked by the person who reads it.

export const percent = (p) => (p > 0.99 && p < 1 ? "over 99 %" : p < 0.01 ? "under 1 %" : `${Math.round(100 * p)} %`);

export class Card {
  // `changed` is called when a mark changes, `again` with the question's id when it is to be asked anew.
  constructor([id, title, prompt], changed, again) {
    Object.assign(this, { id, title, changed, mark: null });
    this.node = document.getElementById("answer").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.node.querySelector(selector);
    this.node.id = id;
    this.find("h3").textContent = title;
    this.find(".prompt").textContent = prompt;
    this.find(".marks").setAttribute("aria-label", `Mark the answer: ${title}`);
    this.find(".right").addEventListener("click", () => this.pressed("right"));
    this.find(".wrong").addEventListener("click", () => this.pressed("wrong"));
    this.find(".again").addEventListener("click", () => again(id));
    this.find(".correction span").textContent = `Correct answer: ${title}`;
    this.find("input").addEventListener("input", changed);
    this.clear();
  }

  // `context`: what the model is told with the question; `asking`: whose answer may be put here.
  clear(state = "empty", context = "", asking = null) {
    Object.assign(this, { answer: null, confidence: null, isUnsure: false, model: "", served: "", context, asking });
    this.node.dataset.state = state;
    this.find(".text").textContent = "";
    this.find(".percent").textContent = state === "asking" ? "asking …" : "";
    for (const name of [".unsure", ".of", ".also", ".problem", ".marks"]) this.find(name).hidden = true;
    this.find(".bar").hidden = true;
    this.find("input").value = "";
    this.press(null);
  }

  // Takes one event of the stream.
  hear(event, unsureBelow) {
    if (event.again !== undefined) {
      this.find(".text").textContent = "";
      this.problem(event.again);
      this.node.dataset.state = "asking";
    } else if (event.piece !== undefined) {
      this.find(".problem").hidden = true;
      this.find(".text").textContent += event.piece;
    } else if (event.error !== undefined) {
      this.fail(event.error);
    } else if (event.answer !== undefined) {
      this.answered(event, unsureBelow);
    }
  }

  answered(event, unsureBelow) {
    Object.assign(this, { answer: event.answer, confidence: event.confidence, model: event.model, served: event.served });
    this.isUnsure = !event.weighing && event.confidence !== null && event.confidence < unsureBelow;
    this.node.dataset.state = this.isUnsure ? "unsure" : "done";
    this.find(".text").textContent = event.answer + (event.cut ? " … (cut off at the limit of length)" : "");
    this.find(".unsure").hidden = !this.isUnsure;
    const known = event.confidence !== null;
    this.find(".bar").hidden = !known;
    if (known) this.find(".bar span").style.width = `${Math.round(100 * event.confidence)}%`;
    this.find(".percent").textContent = known ? percent(event.confidence) : event.weighing ? "weighing …" : "confidence not told";
    this.find(".of").textContent = `The percentage is the probability of ${event.of}.`;
    this.find(".of").hidden = !known || !event.of;
    const others = (event.others ?? []).filter(([, p]) => p >= 0.01);
    this.find(".also").textContent = `Otherwise: ${others.map(([name, p]) => `${name} (${percent(p)})`).join(", ")}`;
    this.find(".also").hidden = !others.length;
    for (const name of [".marks", ".right", ".wrong"]) this.find(name).hidden = false;
  }

  problem(words) {
    this.find(".problem").textContent = words;
    this.find(".problem").hidden = false;
  }

  fail(words) {
    this.answer = null;
    this.node.dataset.state = "error";
    this.find(".text").textContent = "";
    this.find(".percent").textContent = "no answer";
    this.problem(words);
    for (const name of [".right", ".wrong"]) this.find(name).hidden = true;
    this.find(".marks").hidden = false;
  }

  pressed(mark) {
    this.press(this.mark === mark ? null : mark);
    this.isWithdrawn = this.mark === null; // by the reader; a card that was cleared takes nothing back
    if (this.mark === "wrong") this.find("input").focus();
    this.changed();
  }

  press(mark) {
    this.mark = mark;
    this.isWithdrawn = false;
    for (const name of ["right", "wrong"]) {
      this.find(`.${name}`).hidden = false;
      this.find(`.${name}`).setAttribute("aria-pressed", String(mark === name));
    }
    this.find(".correction").hidden = mark !== "wrong";
  }

  get correction() {
    return this.mark === "wrong" ? this.find("input").value.trim() : "";
  }

  // As the server keeps it; null where nothing is marked and no mark was taken back.
  marked() {
    if (this.answer === null || (this.mark === null && !this.isWithdrawn)) return null;
    return { answer: this.answer, verdict: this.mark ?? "withdrawn", correction: this.correction, confidence: this.confidence, model: this.model };
  }

  spoken() {
    const told = this.confidence === null ? "" : `, ${percent(this.confidence)}`;
    return `${this.title}: ${this.answer}${told}${this.isUnsure ? ", unsure" : ""}.`;
  }
}
