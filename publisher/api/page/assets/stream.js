// The list of invalidations, the newest first.

import { byId, counted, element, setText, timeOfDay, whole } from "./text.js";

const SHOWN_MAX = 200;
const NAMES_MAX = 12;

export class Stream {
  constructor() {
    this.list = byId("stream");
    this.summary = byId("stream-summary");
    this.pause = byId("pause");
    this.pause.addEventListener("click", () => this.#setPaused(!this.isPaused));
    this.isPaused = false;
    this.clear();
  }

  clear() {
    this.waiting = [];
    this.beginsAt = performance.now();
    this.list.replaceChildren(element("li", { class: "empty" }, "No invalidations yet."));
    this.#setPaused(false);
  }

  /** Show one entry of the log, or a gap; while paused, keep it for later. */
  show(kind, entry) {
    if (this.isPaused) {
      this.waiting = [...this.waiting, [kind, entry]].slice(-SHOWN_MAX);
      setText(this.summary, `${counted(this.waiting.length, "more", "more")} since you paused`);
      return;
    }
    this.list.querySelector(".empty")?.remove();
    this.list.prepend(this.#row(kind, entry));
    while (this.list.children.length > SHOWN_MAX) this.list.lastElementChild.remove();
  }

  #setPaused(isPaused) {
    this.isPaused = isPaused;
    this.pause.setAttribute("aria-pressed", String(isPaused));
    setText(this.pause, isPaused ? "Resume" : "Pause");
    setText(this.summary, isPaused ? "paused" : "");
    if (isPaused) return;
    for (const [kind, entry] of this.waiting.splice(0)) this.show(kind, entry);
  }

  #row(kind, entry) {
    const row = element("li", { class: "invalidation", "data-kind": kind });
    if (performance.now() - this.beginsAt > 2_000) row.classList.add("is-new");
    row.append(sentAt(entry), element("span", { class: "sequence" }, entry.sequence == null ? "" : `#${whole(entry.sequence)}`));
    row.append(element("div", { class: "what" }, ...whatOf(kind, entry)));
    const why = whyOf(entry);
    if (why) row.append(why);
    return row;
  }
}

function sentAt(entry) {
  const sent = entry.sent_at ? new Date(entry.sent_at) : new Date();
  return element("time", { datetime: sent.toISOString(), title: sent.toISOString() }, timeOfDay(sent));
}

function whatOf(kind, entry) {
  if (kind === "gap") return [entry.detail ?? "Some invalidations were missed."];
  if (kind === "unreadable") return ["⚠ unreadable: replicas drop everything when they read it"];
  if (entry.everything) return [target("everything", "")];
  const targets = [
    ...entry.keys.map((key) => ["key", key]),
    ...entry.tags.map((tag) => ["tag", tag]),
    ...entry.prefixes.map((prefix) => ["prefix", `${prefix}…`]),
  ];
  const shown = targets.slice(0, NAMES_MAX).map(([word, name]) => target(word, name));
  return targets.length > NAMES_MAX ? [...shown, `and ${whole(targets.length - NAMES_MAX)} more`] : shown;
}

const target = (word, name) => element("span", { class: "target" }, element("span", { class: "kind" }, word), name);

function whyOf(entry) {
  if (!entry.reason && !entry.source) return null;
  const reason = entry.reason ? [element("q", {}, entry.reason)] : [];
  const source = entry.source ? [`${entry.reason ? " · " : ""}by ${entry.source}`] : [];
  return element("div", { class: "why" }, ...reason, ...source);
}
