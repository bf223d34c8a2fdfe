// Follows the invalidations: the newest of the log, and each that is published. EventSource cannot send a token, hence
// this reader.

import { ApiProblem, openEvents, pause, readHistory } from "./api.js";

const RECENT = 50;
const POLL_MS = 2_000;
const SILENCE_MS_MAX = 60_000; // a stream sends a heartbeat every 15 s
const BACKOFF_MS_MAX = 10_000;
const STREAM_AGAIN_MS = 60_000;

/**
 * Call `show(kind, entry)` for each entry in the log of `namespace`, and `report(state)` when the way it is followed
 * changes, until `signal` is aborted. Kinds: invalidation, unreadable, gap. States: live, polling, lost.
 */
export async function follow(namespace, { show, report, signal }) {
  const entries = new ShownEntries(show);
  let failures = 0;
  while (true) {
    try {
      await readStream(namespace, entries, report, signal, () => (failures = 0));
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiProblem)) throw error;
      if (isWithoutStream(error)) {
        await poll(namespace, entries, report, signal);
        continue;
      }
      report("lost", error);
    }
    failures += 1;
    await pause(Math.random() * Math.min(BACKOFF_MS_MAX, 500 * 2 ** failures), signal);
  }
}

// The publisher has too many clients, or a proxy does not forward streams.
const isWithoutStream = (problem) => problem.kind.endsWith(":streams-exhausted") || problem.status === 404;

/** Poll the newest entries; return when it is time to try a stream again. */
async function poll(namespace, entries, report, signal) {
  for (let waited = 0; waited < STREAM_AGAIN_MS; waited += POLL_MS) {
    try {
      await catchUp(namespace, entries, signal);
      report("polling");
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      report("lost", error);
    }
    await pause(POLL_MS, signal);
  }
}

async function catchUp(namespace, entries, signal) {
  entries.catchUp((await readHistory(namespace, RECENT, signal)).invalidations);
}

async function readStream(namespace, entries, report, signal, onLinked) {
  const stopped = new AbortController();
  let needsLog = entries.lastEventId === null; // a resumed stream begins with the missed events
  const response = await openEvents(namespace, entries.lastEventId, AbortSignal.any([signal, stopped.signal]));
  for await (const event of eventsOf(response.body, stopped)) {
    // Resuming from an id is correct only after the log was read up to it.
    if (event.id && !needsLog) entries.lastEventId = event.id;
    if (event.type === "linked") {
      // Not earlier: an entry logged between this read and the link would be in neither.
      if (needsLog) await catchUp(namespace, entries, signal);
      needsLog = false;
      report("live");
      onLinked();
    } else if (event.type === "lost") {
      report("lost", new ApiProblem(503, "The publisher has lost its link to Redis", JSON.parse(event.data).detail));
    } else if (["invalidation", "unreadable", "gap"].includes(event.type)) {
      entries.add(event.type, JSON.parse(event.data), event.id);
    }
  }
}

/** Shows each entry once: the log and the stream overlap. */
class ShownEntries {
  constructor(show) {
    this.lastEventId = null;
    this.show = show;
    this.shown = new Set();
  }

  /** Add a page of the log, the newest first. */
  catchUp(entries) {
    const newest = entries[0];
    const epoch = entries.find((entry) => entry.epoch)?.epoch;
    if (this.shown.size && entries.length && !entries.some((entry) => this.shown.has(idOf(entry, epoch)))) {
      this.show("gap", { detail: "Some invalidations are missing here: the log no longer has them, or it was restarted." });
    }
    for (const entry of entries.toReversed()) {
      this.add(entry.unreadable ? "unreadable" : "invalidation", entry, idOf(entry, epoch));
    }
    if (newest && epoch) this.lastEventId = idOf(newest, epoch);
  }

  add(kind, entry, id) {
    if (id && this.shown.has(id)) return;
    if (id) this.shown.add(id);
    if (this.shown.size > 20 * RECENT) this.shown = new Set([...this.shown].slice(-4 * RECENT));
    this.show(kind, entry);
  }
}

const idOf = (entry, epoch) => (entry.epoch ?? epoch ? `${entry.epoch ?? epoch}:${entry.sequence}` : null);

/** Parse Server-Sent Events from a body, as the HTML standard defines them. */
async function* eventsOf(body, stopped) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const silence = setTimeout(() => stopped.abort(), SILENCE_MS_MAX);
      const { value, done } = await reader.read().finally(() => clearTimeout(silence));
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    throw new ApiProblem(0, "The stream has ended", String(error.message));
  } finally {
    stopped.abort();
  }
}

function eventOf(block) {
  const event = { type: "message", data: [], id: null };
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") event.type = value;
    else if (field === "data") event.data.push(value);
    else if (field === "id") event.id = value;
  }
  return event.data.length ? { ...event, data: event.data.join("\n") } : null;
}
