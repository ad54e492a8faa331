// The page: an image, eight answers, questions of one's own, a report to print, marks to save.
import { Card } from "./answers.js";
import { asked, events, picture, sent } from "./net.js";
import { fill, sections } from "./report.js";

const $ = (id) => document.getElementById(id);
const SECONDS = { well: 60, ill: 5 }; // between two looks at the model's server
const page = { settings: null, cards: [], file: null, image: null, url: null, date: "", turns: [], written: null, saved: {}, running: 0, stop: null, timer: null };

const told = (value) => value.trim();
const now = () => new Intl.DateTimeFormat(undefined, { dateStyle: "long", timeStyle: "short" }).format(new Date());
const isStopped = (fault) => fault.name === "AbortError";

function say(words) {
  $("banner").querySelector("p").textContent = words;
  $("banner").hidden = !words;
}

const announce = (words) => ($("live").textContent = words);

// ---- the model's server ----

async function look() {
  let wait = SECONDS.ill;
  try {
    const settings = await asked("api/status");
    if (!page.settings) build(settings);
    page.settings = settings;
    $("model").dataset.state = settings.problem ? "ill" : "well";
    $("model").textContent = settings.problem ? "The model's server cannot be used" : `Model: ${settings.model}`;
    if (settings.problem) say(settings.problem);
    else if ($("banner").dataset.of === "server") say("");
    $("banner").dataset.of = settings.problem ? "server" : "";
    if (!settings.problem) wait = SECONDS.well;
  } catch (fault) {
    $("model").dataset.state = "ill";
    $("model").textContent = fault.message;
    if (fault.status === 401) return location.reload();
  }
  clearTimeout(page.timer); // of another look, asked for meanwhile
  page.timer = setTimeout(look, 1000 * wait);
}

function build(settings) {
  $("threshold").textContent = Math.round(100 * settings.unsure_below);
  for (const name of settings.categories) $("category").append(new Option(name.replaceAll("_", " "), name));
  page.cards = settings.questions.map((question) => new Card(question, counted, again));
  $("answers").append(...page.cards.map((card) => card.node));
}

// ---- the image ----

// Marks that are not saved are not lost without a word.
function mayForget(cards = page.cards) {
  const { length } = unsaved(cards);
  return !length || confirm(`${marksTold(length)} on this image ${length === 1 ? "is" : "are"} not saved. Go on without ${length === 1 ? "it" : "them"}?`);
}

// What would be lost with the marks that are not saved, to see whether there is more of it later.
const atStake = () => JSON.stringify(unsaved().map((card) => [card.id, card.answer, card.mark, card.correction]));

// The image before stays, to be read and marked, until the new one has arrived.
async function take(file) {
  if (!file || !page.settings) return;
  const most = page.settings.largest_file;
  if (file.size > most) {
    const size = Math.ceil(file.size / 1e5) / 10;
    return say(`This file is too large: ${size} MB, at most ${most / 1e6} MB can be sent. Save the image smaller, or as PNG or JPEG.`);
  }
  if (!mayForget()) return;
  const given = atStake();
  page.stop?.abort();
  const stop = (page.stop = new AbortController());
  say("");
  announce("Sending the image.");
  $("drop").dataset.state = "sending";
  try {
    const held = await send(file, stop.signal);
    if (atStake() !== given && !mayForget()) return announce("The image before stays.");
    stop.abort(); // what was asked of the image before while this one was on its way
    page.stop = new AbortController();
    const replaced = page.file !== null;
    show(file, held);
    forget(replaced);
    await askEight();
  } catch (fault) {
    if (!isStopped(fault)) say(fault.message);
  } finally {
    if (page.stop === stop) delete $("drop").dataset.state; // else it is another image's
  }
}

// Gives the server an image; its name there, and the picture as the model sees it.
async function send(file, signal) {
  const { image, width, height } = await sent("api/images", file, signal, announce);
  return { image, width, height, blob: await picture(`api/images/${image}`, signal) };
}

function show(file, { image, width, height, blob }) {
  if (page.url) URL.revokeObjectURL(page.url);
  Object.assign(page, { file, image, url: URL.createObjectURL(blob) });
  $("picture").src = page.url;
  $("caption").textContent = `${file.name || "pasted image"}, ${width} × ${height} pixels`;
  $("figure").hidden = false;
  $("invitation").hidden = true;
  $("choose").textContent = "Choose another image";
  delete $("drop").dataset.state;
}

// What belonged to the image before this one, its details too; those given before the first image are meant for it.
function forget(replaced) {
  Object.assign(page, { turns: [], written: null, saved: {}, date: now() });
  $("talk").replaceChildren();
  $("written").hidden = true;
  for (const id of ["print", "whole", "question", "send"]) $(id).disabled = false;
  if (replaced) for (const id of ["context", "category", "patient"]) $(id).value = "";
}

// Does what needs the image held by the server, given its name there; one that is held no more (a restart) is sent again.
async function* withImage(make, signal) {
  const { file, image } = page;
  try {
    yield* make(image);
  } catch (fault) {
    if (fault.status !== 410) throw fault;
    const held = await send(file, signal);
    if (page.file === file) show(file, held); // else another has come meanwhile
    yield* make(held.image);
  }
}

function question(more, context) {
  const { signal } = page.stop;
  return withImage((image) => events("api/answers", { image, context, ...more }, signal, announce), signal);
}

const contextNow = () => told($("context").value);

// ---- the eight answers ----

// Counts the streams into the cards; nothing is asked again while there is one, for both would write into the same card.
function running(change) {
  page.running += change;
  $("answers").ariaBusy = String(page.running > 0);
  for (const button of document.querySelectorAll("#all, .again")) button.disabled = page.running > 0;
}

const again = (id) => mayForget(page.cards.filter((card) => card.id === id)) && askEight(id);

// Cards belong to the asking that cleared them last: one that was stopped ends after the next image's began, and leaves them alone.
async function askEight(only = null) {
  const cards = page.cards.filter((card) => only === null || card.id === only);
  const context = contextNow();
  const { signal } = page.stop;
  for (const card of cards) card.clear("asking", context, signal);
  counted();
  const open = new Map(cards.map((card) => [card.id, card]));
  let failed = "";
  running(1);
  try {
    for await (const event of question(only === null ? {} : { question: only }, context)) {
      const card = open.get(event.question ?? only);
      if (card.asking === signal) card.hear(event, page.settings.unsure_below);
      failed = event.error ?? failed;
    }
    if (failed) {
      say(failed);
      look();
    }
    announce(cards.filter((card) => card.answer !== null).map((card) => card.spoken()).join(" "));
    if (cards.some((card) => card.node.dataset.state === "asking")) throw new Error("The connection to the page broke off. Try again.");
  } catch (fault) {
    const words = signal.aborted ? "Stopped: another image was chosen." : fault.message;
    for (const card of cards) if (card.asking === signal && card.node.dataset.state === "asking") card.fail(words);
    if (signal.aborted) return;
    say(words);
  } finally {
    running(-1);
  }
  page.date = now();
}

// ---- questions of one's own, and the report in one answer ----

function turn(words, className) {
  const node = document.createElement("p");
  node.className = className;
  node.textContent = words;
  $("talk").append(node);
  return node;
}

async function askFree(event) {
  event.preventDefault();
  const words = told($("question").value);
  if (!words || $("send").disabled) return;
  $("send").disabled = true;
  turn(words, "asked");
  const node = turn("", "said");
  const { turns } = page; // of this image, should another come meanwhile
  const before = turns.slice(-page.settings.latest_turns).map((said) => said.slice(0, page.settings.longest_turn));
  if (await stream(node, node, { turns: [...before, words] }, contextNow())) {
    turns.push(words, node.textContent);
    $("question").value = "";
  }
  $("send").disabled = false;
  $("question").focus();
}

async function askWhole() {
  $("whole").disabled = true;
  const [text, problem] = $("written").children;
  const { signal } = page.stop;
  const context = contextNow();
  text.textContent = "";
  problem.hidden = true;
  page.written = null;
  $("written").hidden = false;
  const last = await stream(text, problem, { question: "report" }, context);
  $("whole").disabled = false;
  if (signal.aborted) return; // all of this is another image's by now
  if (last) page.written = { text: last.answer, model: last.served, context, date: now() };
  if (last) text.replaceChildren(...sections(last.answer));
}

// Fills `node` with an answer as it comes, or `problem` with why there is none; its last event if it came to its end.
async function stream(node, problem, value, context) {
  const fail = (words) => {
    problem.textContent = words;
    problem.classList.add("problem");
    problem.hidden = false;
    say(words);
    return null;
  };
  node.classList.add("waiting");
  try {
    for await (const event of question(value, context)) {
      if (event.again !== undefined) {
        node.textContent = "";
        announce(event.again);
      }
      if (event.piece !== undefined) node.textContent += event.piece;
      if (event.error !== undefined) return fail(event.error);
      if (event.answer !== undefined) {
        node.textContent = event.answer;
        return event;
      }
    }
    return fail("The connection to the page broke off. Try again.");
  } catch (fault) {
    return isStopped(fault) ? null : fail(fault.message);
  } finally {
    node.classList.remove("waiting");
  }
}

// ---- marks ----

const marksTold = (count) => `${count} ${count === 1 ? "mark" : "marks"}`;

// The cards whose mark is not in the sheet as it stands here; a confidence may follow its answer and makes no other mark.
function unsaved(cards = page.cards) {
  const none = { verdict: "withdrawn" };
  const differs = (mark, kept = none) => mark.verdict !== kept.verdict || (mark.verdict !== none.verdict && (mark.answer !== kept.answer || mark.correction !== kept.correction));
  return cards.filter((card) => card.marked() && differs(card.marked(), page.saved[card.id]));
}

function counted() {
  const count = unsaved().length;
  $("save").disabled = !count;
  $("marked").textContent = count ? `${count} of ${page.cards.length} marked, not saved yet.` : "Mark answers right or wrong to keep them for training.";
}

async function save() {
  const marks = Object.fromEntries(unsaved().map((card) => [card.id, card.marked()]));
  const { saved } = page; // of this image, should another come meanwhile; so are the details
  const value = { category: $("category").value, patient: told($("patient").value), marks };
  $("save").disabled = true;
  try {
    for await (const told of withImage((image) => saving({ image, ...value }))) {
      Object.assign(saved, marks);
      counted();
      const left = unsaved().length; // what was marked or changed meanwhile
      const rest = left ? ` ${marksTold(left)} not saved yet.` : "";
      $("marked").textContent = `Saved: ${marksTold(told.saved)}; the sheet holds ${told.images} ${told.images === 1 ? "image" : "images"}.${rest}`;
      announce($("marked").textContent);
      say(told.behind ?? "");
    }
  } catch (fault) {
    say(fault.message);
    $("marked").textContent = "Not saved.";
    $("save").disabled = false;
  }
}

async function* saving(value) {
  yield await asked("api/marks", value);
}

// ---- paper ----

function prepare() {
  const { cards, settings, url, date, written } = page;
  const details = [["Patient code", told($("patient").value)], ["View", $("category").value]];
  const facts = { cards, notice: settings.notice, image: url, details, written, unsureBelow: settings.unsure_below, date };
  fill($("report"), facts);
}

// ---- wiring ----

function dropped(data) {
  if (data.files.length) take(data.files[0]);
  else if (data.types.includes("text/uri-list")) say("Only files can be dropped: the page fetches no address. Save the image first, then drop the file.");
}

$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dropped(event.dataTransfer);
});
document.addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files[0]));
$("banner").querySelector("button").addEventListener("click", () => say(""));
$("all").addEventListener("click", () => mayForget() && askEight());
$("ask").addEventListener("submit", askFree);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) askFree(event);
});
$("whole").addEventListener("click", askWhole);
$("save").addEventListener("click", save);
$("print").addEventListener("click", () => window.print());
window.addEventListener("beforeunload", (event) => unsaved().length && event.preventDefault());
window.addEventListener("beforeprint", () => page.url && prepare());
look();
