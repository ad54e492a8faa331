// The sheet of paper: image, date, model, eight answers with the reader's marks, and the notice. Shown in print only.
import { percent } from "./answers.js";

const element = (name, text = "", className = "") => {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  return node;
};

function read(card) {
  if (card.mark === "right") return "found right";
  if (card.mark === "wrong") return card.correction ? `found wrong; instead: ${card.correction}` : "found wrong";
  return "not marked";
}

function rows(cards) {
  const body = element("tbody");
  for (const card of cards) {
    const row = element("tr");
    const told = card.confidence === null ? "" : percent(card.confidence);
    row.append(
      element("th", card.title),
      element("td", card.answer ?? "no answer"),
      element("td", card.isUnsure ? `${told}, unsure` : told),
      element("td", card.answer === null ? "" : read(card)),
    );
    row.firstChild.scope = "row";
    body.append(row);
  }
  return body;
}

// What the answers that are there have in common; where they differ, which of them has what.
function shared(cards, name) {
  const titles = new Map();
  for (const card of cards.filter((card) => card.answer !== null)) titles.set(card[name], [...(titles.get(card[name]) ?? []), card.title]);
  if (titles.size < 2) return titles.keys().next().value ?? "";
  return [...titles].map(([value, of]) => `${value || "nothing"} (${of.join(", ")})`).join("; ");
}

// A report as models write it: `## Title` lines become headings, the rest stays text.
export function sections(text) {
  const nodes = [];
  for (const line of text.split("\n")) {
    const title = line.match(/^#+\s+(.*)/);
    if (title) nodes.push(element("h3", title[1]));
    else if (line.trim()) nodes.push(element("p", line));
  }
  return nodes;
}

// A report in one answer is not one of the eight: it may be another model's, and of another time.
function whole({ text, model, context, date }) {
  const by = [date, model, context && `told: ${context}`].filter(Boolean).join(", ");
  return [element("h2", "The model's report in one answer"), element("p", by, "hint"), ...sections(text)];
}

export function fill(paper, { cards, notice, image, details, written, unsureBelow, date }) {
  const head = element("tr");
  for (const title of ["Question", "Model's answer", "Confidence", "Reader"]) head.append(element("th", title));
  const table = element("table");
  table.append(element("thead"), rows(cards));
  table.tHead.append(head);
  const picture = element("img");
  picture.src = image;
  picture.alt = "The ultrasound image";
  const facts = element("dl");
  for (const [name, value] of [["Date", date], ["Model", shared(cards, "served")], ...details, ["Told to the model", shared(cards, "context")]]) {
    if (value) facts.append(element("dt", name), element("dd", value));
  }
  const top = element("div", "", "top");
  top.append(picture, facts);
  const meaning = `Confidence is the model's own probability, not the chance that it is right; below ${percent(unsureBelow)} it is called unsure.`;
  paper.replaceChildren(element("h1", "Fetal ultrasound: answers of a research model"), element("p", notice, "notice"), top, table);
  if (written) paper.append(...whole(written));
  paper.append(element("p", meaning, "hint"), element("p", notice, "notice"));
}
