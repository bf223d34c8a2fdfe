// The form: a preview while the user types, then the confirmation of each replica.

import { ApiProblem, newKey, preview, publish } from "./api.js";
import { byId, counted, element, lastWord, listed, milliseconds, setAttribute, setText } from "./text.js";

const CONFIRM_SECONDS = 1;
const PREVIEW_DELAY_MS = 300;
const CHECK_AGAIN_MS = 600_000; // by default, the publisher keeps an Idempotency-Key longer

export class InvalidationForm {
  constructor() {
    this.fields = byId("form-fields");
    this.kind = byId("kind");
    this.names = byId("names");
    this.reason = byId("reason");
    this.send = byId("send");
    this.preview = byId("preview");
    this.ticks = new Ticks();
    this.namespace = "";
    this.replicas = [];
    this.sending = null;
    this.previewing = null;
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#publish();
    });
    for (const field of [this.kind, this.names]) field.addEventListener("input", () => this.#changed());
    this.names.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
    });
  }

  begin(namespace, right) {
    this.namespace = namespace;
    this.replicas = [];
    this.fields.disabled = right !== "rw";
    byId("form-read-only").hidden = right === "rw";
    this.ticks.clear();
    this.#changed();
  }

  /** Update the replicas: missing replicas may have caught up. */
  setReplicas(replicas) {
    const isOther = replicas.map((replica) => replica.replica).join("\n") !== this.replicas.map((replica) => replica.replica).join("\n");
    this.replicas = replicas;
    if (this.ticks.hasCaughtUp(replicas)) this.#checkAgain();
    if (isOther) this.#changed();
  }

  /** Have the publisher compare the positions of the missing replicas with the log: the same request is logged once. */
  async #checkAgain() {
    const { sending } = this;
    if (!sending?.isAnswered || sending.isCheckedAgain || performance.now() - sending.sentAt > CHECK_AGAIN_MS) return;
    sending.isCheckedAgain = true;
    try {
      const accepted = await publish(sending.body, sending.key);
      if (this.sending === sending && sending.body.namespace === this.namespace) this.ticks.confirmLater(accepted);
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error; // they stay missing, and the next echo repeats the request
    } finally {
      sending.isCheckedAgain = false;
    }
  }

  /** The targets, as the API expects them; null when there are none. */
  #targets() {
    const kind = this.kind.value;
    if (kind === "everything") return { everything: true };
    const names = [...new Set(this.names.value.split("\n").map((name) => name.trim()).filter(Boolean))];
    return names.length ? { [kind]: names } : null;
  }

  #changed() {
    const isEverything = this.kind.value === "everything";
    byId("names-field").hidden = isEverything;
    setText(this.send, isEverything ? `Invalidate all of ${this.namespace}` : "Invalidate");
    this.previewing?.abort();
    const targets = this.#targets();
    if (!targets || this.fields.disabled) return setText(this.preview, "");
    this.previewing = new AbortController();
    const { signal } = this.previewing;
    setTimeout(() => signal.aborted || this.#preview(targets, signal), PREVIEW_DELAY_MS);
  }

  async #preview(targets, signal) {
    try {
      const found = await preview({ namespace: this.namespace, ...targets }, signal);
      if (!signal.aborted) setText(this.preview, previewText(found));
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiProblem)) throw error;
      setText(this.preview, `No preview: ${error.message}`);
    }
  }

  async #publish() {
    const targets = this.#targets();
    if (!targets) {
      this.ticks.fail("No targets", "Name at least one key, tag or prefix, one per line.");
      return this.names.focus();
    }
    if (this.sending?.isUnderWay) return;
    const body = { namespace: this.namespace, ...targets, reason: this.reason.value.trim(), confirm: { timeout_seconds: CONFIRM_SECONDS } };
    // Without a response, sending the same request again repeats the same invalidation.
    const isRepeat = this.sending && !this.sending.isAnswered && JSON.stringify(this.sending.body) === JSON.stringify(body);
    const sending = { body, key: isRepeat ? this.sending.key : newKey(), isAnswered: false, isUnderWay: true, sentAt: performance.now() };
    this.sending = sending;
    setAttribute(this.send, "aria-busy", "true");
    const expected = this.replicas.filter((replica) => !replica.is_silent || replica.may_serve);
    this.ticks.begin(titleOf(targets), expected.map((replica) => replica.replica));
    try {
      const accepted = await publish(body, sending.key);
      sending.isAnswered = true;
      if (body.namespace === this.namespace) this.ticks.finish(accepted);
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      sending.isAnswered = error.status >= 400 && error.status < 500;
      const advice = sending.isAnswered ? "" : "\nIt is not known whether it was logged. Send it again: it is published once.";
      this.ticks.fail(`Not confirmed: ${error.title}`, error.message + advice);
    } finally {
      sending.isUnderWay = false;
      this.send.removeAttribute("aria-busy");
      this.#changed(); // the previewed entries may be dropped now
    }
  }
}

function titleOf(targets) {
  if (targets.everything) return "Everything";
  const [[kind, names]] = Object.entries(targets);
  const word = { keys: "Key", tags: "Tag", prefixes: "Prefix" }[kind];
  return names.length === 1 ? `${word} ${names[0]}` : `${names.length} ${kind}`;
}

function previewText(found) {
  const about = found.is_estimate ? "about " : "";
  const missing = found.missing?.length ? `; no answer from ${listed(found.missing)}` : "";
  const others = found.doubt ? "; there may be other replicas" : "";
  return `${counted(found.replicas, "replica")}, ${about}${counted(found.entries, "entry", "entries")}${missing}${others}`;
}

/** The confirmations of the invalidation that was sent last. */
class Ticks {
  constructor() {
    this.box = byId("outcome");
    this.title = byId("outcome-title");
    this.verdict = byId("outcome-verdict");
    this.doubt = byId("outcome-doubt");
    this.list = byId("ticks");
    this.clear();
  }

  clear() {
    this.rows = new Map();
    this.accepted = null;
    this.box.hidden = true;
    this.list.replaceChildren();
    setText(this.verdict, "");
    this.doubt.hidden = true;
  }

  begin(title, replicas) {
    this.clear();
    this.box.hidden = false;
    setText(this.title, title);
    setText(this.verdict, "sent; waiting for the replicas");
    for (const replica of replicas) this.#set(replica, "pending", "…", "");
  }

  fail(title, detail) {
    this.clear();
    this.box.hidden = false;
    setText(this.title, title);
    setText(this.verdict, detail);
  }

  finish(accepted) {
    const { confirmation } = accepted;
    this.accepted = accepted;
    for (const name of [...this.rows.keys()]) {
      if (!confirmation.replicas.some((replica) => replica.replica === name)) this.#remove(name);
    }
    for (const replica of confirmation.replicas) {
      if (replica.outcome === "confirmed") this.#set(replica.replica, "confirmed", "✓", confirmedText(replica));
      else if (replica.outcome === "missing") this.#set(replica.replica, "missing", "✗", missingText(replica));
      else this.#set(replica.replica, "apart", "–", replica.outcome === "silent" ? "silent: it serves nothing from its cache" : "not followed by any subscriber of this process");
    }
    this.#showVerdict();
  }

  /** Whether the position of a missing replica has reached the invalidation. This alone does not confirm it. */
  hasCaughtUp(replicas) {
    if (!this.accepted?.logged) return false;
    const { epoch, sequence } = this.accepted;
    return replicas.some(({ replica, position }) => this.#isMissing(replica) && position?.epoch === epoch && position.sequence >= sequence);
  }

  /** Mark the missing replicas that have confirmed by now. */
  confirmLater({ confirmation }) {
    for (const { replica, outcome } of confirmation.replicas) {
      if (outcome === "confirmed" && this.#isMissing(replica)) this.#set(replica, "confirmed", "✓", "later, by its echo");
    }
    this.#showVerdict();
  }

  #isMissing(replica) {
    return this.rows.get(replica)?.dataset.outcome === "missing";
  }

  #showVerdict() {
    const outcomes = [...this.rows.values()].map((row) => row.dataset.outcome).filter((outcome) => outcome !== "apart");
    const confirmed = outcomes.filter((outcome) => outcome === "confirmed").length;
    const { doubt } = this.accepted.confirmation;
    this.doubt.hidden = !doubt;
    setText(this.doubt, doubt ? `There may be other replicas: ${doubt}` : "");
    const { logged, pending, sequence } = this.accepted;
    const unlogged = pending ? "Sent by HTTP, waiting to be logged; " : "Sent by HTTP, not logged; ";
    const place = logged ? `#${sequence} ` : unlogged;
    if (!outcomes.length) return setText(this.verdict, `${place}${logged ? "is in the log; " : ""}no replica is registered`);
    setText(this.verdict, `${place}confirmed by ${confirmed} of ${counted(outcomes.length, "replica")}`);
  }

  #set(name, outcome, mark, text) {
    let row = this.rows.get(name);
    if (!row) {
      row = element("li", { class: "tick" }, element("span", { class: "mark" }), element("span", { class: "name" }, name), element("span", { class: "quiet" }));
      row.dataset.replica = name;
      this.rows.set(name, row);
      this.list.append(row);
    }
    row.dataset.outcome = outcome;
    setText(row.children[0], mark);
    setText(row.children[2], text);
  }

  #remove(name) {
    this.rows.get(name).remove();
    this.rows.delete(name);
  }
}

function missingText(replica) {
  if (replica.silent_ms === null) return "missing: it may serve the old value until its staleness bound";
  return `missing: ${lastWord({ ...replica, behind: null, position: null })}; it may serve the old value until it is stopped`;
}

function confirmedText(replica) {
  const parts = [milliseconds(replica.latency_ms)];
  if (replica.dropped !== null) parts.push(`dropped ${counted(replica.dropped, "entry", "entries")}`);
  if (replica.how && replica.how !== "message") parts.push(`by its ${replica.how === "http" ? "answer over HTTP" : replica.how}`);
  if (!replica.is_expected) parts.push("joined meanwhile");
  return parts.join(", ");
}
