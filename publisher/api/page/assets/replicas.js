// The grid of replicas: one card each, updated in place.

import { Sparkline } from "./sparkline.js";
import { byId, counted, drawing, element, lastWord, listed, milliseconds, percent, seconds, setAttribute, setText, timeOfDay, whole } from "./text.js";

/** The level of a replica's state, and a word for it: colour alone must not carry meaning. */
export function judged(replica) {
  if (replica.is_silent) return { level: replica.may_serve ? "bad" : "warn", word: "✗ gone silent" };
  if (replica.conflict) return { level: "bad", word: "✗ id used twice" };
  if (replica.is_coherent) {
    return replica.behind ? { level: "good", word: "↻ catching up" } : { level: "good", word: "✓ coherent" };
  }
  if (replica.state === "coherent") return { level: "bad", word: "✗ overdue" };
  if (replica.state === "lost") return { level: "bad", word: "✗ lost" };
  const isWithinBound = replica.staleness_seconds !== null && replica.staleness_seconds < replica.max_staleness_seconds;
  if (replica.state === "recovering" || replica.state === "connecting") {
    return { level: isWithinBound || replica.staleness_seconds === null ? "warn" : "bad", word: `↻ ${replica.state}` };
  }
  return { level: "bad", word: "? unknown" };
}

export class ReplicaGrid {
  /** `forget` dismisses a silent replica by name. */
  constructor(forget) {
    this.forget = forget;
    this.list = byId("replicas");
    this.summary = byId("replicas-summary");
    this.news = byId("replicas-news");
    this.clear();
  }

  clear() {
    this.cards = new Map();
    this.hasShown = false;
    this.list.replaceChildren();
    setText(this.summary, "");
    setText(this.news, "");
  }

  /**
   * Show these replicas, and which joined and left. `mayForget` is whether silent ones may be dismissed.
   */
  show(replicas, mayForget) {
    const names = new Set(replicas.map((replica) => replica.replica));
    const left = [...this.cards.keys()].filter((name) => !names.has(name));
    const joined = [...names].filter((name) => !this.cards.has(name));
    for (const name of left) {
      this.cards.get(name).element.remove();
      this.cards.delete(name);
    }
    for (const name of joined) this.cards.set(name, new Card(name, this.forget));
    for (const replica of replicas) this.cards.get(replica.replica).show(replica, mayForget);
    this.#arrange(replicas);
    this.#summarize(replicas, joined, left);
    this.hasShown = true;
  }

  /** Put the cards in order, and move only those that are out of place. */
  #arrange(replicas) {
    this.list.querySelector(".empty")?.remove();
    replicas.forEach((replica, place) => {
      const { element } = this.cards.get(replica.replica);
      if (this.list.children[place] !== element) this.list.insertBefore(element, this.list.children[place] ?? null);
    });
    if (!replicas.length) {
      this.list.append(element("li", { class: "empty" }, "No replica is registered. A replica appears with its first echo, within a second of its start."));
    }
  }

  #summarize(replicas, joined, left) {
    const coherent = replicas.filter((replica) => replica.is_coherent).length;
    const entries = replicas.reduce((sum, replica) => sum + replica.entries, 0);
    const verdict = coherent === replicas.length ? "all coherent" : `${whole(coherent)} coherent`;
    setText(this.summary, replicas.length ? `${counted(replicas.length, "replica")}, ${verdict}, ${counted(entries, "entry", "entries")}` : "");
    if (!this.hasShown) return;
    const now = timeOfDay(new Date());
    if (left.length) setText(this.news, `${now} ${listed(left, 3)} left`);
    else if (joined.length) setText(this.news, `${now} ${listed(joined, 3)} joined`);
  }
}

class Card {
  constructor(name, forget) {
    this.state = element("span", { class: "state" });
    this.staleness = element("span");
    this.lag = element("span");
    this.bar = new Bar();
    this.sparkline = new Sparkline();
    this.facts = new Map();
    this.element = element(
      "li",
      { class: "replica" },
      element("div", { class: "top" }, element("h3", {}, name), this.state),
      element("div", { class: "measure" }, element("span", {}, "stale"), this.bar.element, this.staleness),
      element("div", { class: "measure" }, element("span", {}, "lag"), this.sparkline.element, this.lag),
      this.#factList(),
      this.#silence(name, forget),
    );
    this.element.dataset.replica = name;
  }

  #factList() {
    const list = element("dl", { class: "facts" });
    for (const [name, label, kind] of FACTS) {
      const value = element("dd", kind ? { class: kind } : {});
      this.facts.set(name, value);
      list.append(element("dt", {}, label), value);
    }
    return list;
  }

  #silence(name, forget) {
    this.lastWord = element("p", { class: "quiet" });
    this.forgetButton = element("button", { type: "button" }, "Forget");
    this.forgetButton.title = `Remove ${name} from the list: it has ended for good`;
    this.forgetButton.addEventListener("click", () => forget(name));
    this.silence = element("div", { class: "silence" }, this.lastWord, this.forgetButton);
    this.silence.hidden = true;
    return this.silence;
  }

  show(replica, mayForget) {
    const { level, word } = judged(replica);
    setAttribute(this.element, "data-level", level);
    setText(this.state, word);
    this.silence.hidden = !(replica.is_silent || replica.conflict);
    this.forgetButton.hidden = !(mayForget && replica.is_silent);
    setText(this.lastWord, replica.is_silent ? lastWord(replica) : replica.conflict ? `also the id of ${replica.conflict}` : "");
    for (const [name, , , describe] of FACTS) setText(this.facts.get(name), describe(replica));
    if (replica.is_silent) return this.#showSilent(replica);
    this.bar.show(replica.staleness_seconds, replica.max_staleness_seconds);
    const bound = replica.max_staleness_seconds === null ? "" : ` of ${seconds(replica.max_staleness_seconds)}`;
    setText(this.staleness, replica.staleness_seconds === null ? "not proven yet" : `${seconds(replica.staleness_seconds)}${bound}`);
    this.sparkline.add(replica.lag_ms);
    setText(this.lag, replica.lag_ms === null ? "not measured" : milliseconds(replica.lag_ms));
  }

  #showSilent(replica) {
    this.bar.show(1, 1);
    setText(this.staleness, replica.may_serve ? "may serve old values" : "serves nothing from its cache");
    setText(this.lag, "–");
  }
}

const FACTS = [
  ["position", "position", "", (replica) => (replica.position ? whole(replica.position.sequence) : "–")],
  ["behind", "behind", "", (replica) => (replica.behind === null ? "–" : whole(replica.behind))],
  ["entries", "entries", "", (replica) => whole(replica.entries)],
  ["hits", "hits", "", (replica) => percent(replica.hit_ratio)],
  ["clears", "clears", "", (replica) => whole(replica.clears_total)],
  ["replays", "replays", "", (replica) => whole(replica.replays)],
  ["where", "where", "whole", (replica) => `${replica.host || "?"}, pid ${replica.pid}, ${replica.version || "?"}`],
];

/** How much of the staleness bound is used. The text beside it says the same. */
class Bar {
  constructor() {
    this.fill = drawing("rect", { class: "fill", width: 0, height: 8 });
    const track = drawing("rect", { class: "track", width: 100, height: 8 });
    this.element = drawing("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, track, this.fill);
  }

  show(staleness, bound) {
    const share = staleness === null || !bound ? 0 : Math.min(1, staleness / bound);
    setAttribute(this.fill, "width", String(Math.round(share * 100)));
  }
}
