// What was invalidated: each as it is published, and once that is heard, the newest from the log. EventSource cannot send
// a token, hence this reader.

import { ApiProblem, openEvents, pause, readHistory } from "./api.js";

const RECENT = 50;
const POLL_MS = 2_000;
const SILENCE_MS_MAX = 60_000; // a stream says that it is there every 15 s
const BACKOFF_MS_MAX = 10_000;
const STREAM_AGAIN_MS = 60_000;

/**
 * Tell `show(kind, entry)` of everything in the log of `namespace`, and `tell(state)` how it is heard, until `signal`
 * is aborted. Kinds: invalidation, unreadable, gap. States: live, polling, lost.
 */
export async function follow(namespace, { show, tell, signal }) {
  const heard = new Heard(show);
  let failures = 0;
  while (true) {
    try {
      await readStream(namespace, heard, tell, signal, () => (failures = 0));
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiProblem)) throw error;
      if (isWithoutStream(error)) {
        await poll(namespace, heard, tell, signal);
        continue;
      }
      tell("lost", error);
    }
    failures += 1;
    await pause(Math.random() * Math.min(BACKOFF_MS_MAX, 500 * 2 ** failures), signal);
  }
}

// All places are taken, or what stands between lets no streams through.
const isWithoutStream = (problem) => problem.kind.endsWith(":streams-exhausted") || problem.status === 404;

/** Ask for the newest again and again; return when it is time to try a stream once more. */
async function poll(namespace, heard, tell, signal) {
  for (let waited = 0; waited < STREAM_AGAIN_MS; waited += POLL_MS) {
    try {
      await catchUp(namespace, heard, signal);
      tell("polling");
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      tell("lost", error);
    }
    await pause(POLL_MS, signal);
  }
}

async function catchUp(namespace, heard, signal) {
  heard.catchUp((await readHistory(namespace, RECENT, signal)).invalidations);
}

async function readStream(namespace, heard, tell, signal, onLinked) {
  const stopped = new AbortController();
  let needsLog = heard.lastEventId === null; // one that resumes tells by itself what came meanwhile
  const answer = await openEvents(namespace, heard.lastEventId, AbortSignal.any([signal, stopped.signal]));
  for await (const event of eventsOf(answer.body, stopped)) {
    // A place to resume from is none before the log has been read up to it.
    if (event.id && !needsLog) heard.lastEventId = event.id;
    if (event.type === "linked") {
      // Not before: what is logged between the reading and the link would be in neither.
      if (needsLog) await catchUp(namespace, heard, signal);
      needsLog = false;
      tell("live");
      onLinked();
    } else if (event.type === "lost") {
      tell("lost", new ApiProblem(503, "The publisher has lost Redis", JSON.parse(event.data).detail));
    } else if (["invalidation", "unreadable", "gap"].includes(event.type)) {
      heard.take(event.type, JSON.parse(event.data), event.id);
    }
  }
}

/** Which entries were shown already: the log and the stream overlap. */
class Heard {
  constructor(show) {
    this.lastEventId = null;
    this.show = show;
    this.shown = new Set();
  }

  /** Take a page of the log, the newest first. */
  catchUp(entries) {
    const newest = entries[0];
    const epoch = entries.find((entry) => entry.epoch)?.epoch;
    if (this.shown.size && entries.length && !entries.some((entry) => this.shown.has(idOf(entry, epoch)))) {
      this.show("gap", { detail: "What came in between is not known: the log has gone on, or begun anew." });
    }
    for (const entry of entries.toReversed()) {
      this.take(entry.unreadable ? "unreadable" : "invalidation", entry, idOf(entry, epoch));
    }
    if (newest && epoch) this.lastEventId = idOf(newest, epoch);
  }

  take(kind, entry, id) {
    if (id && this.shown.has(id)) return;
    if (id) this.shown.add(id);
    if (this.shown.size > 20 * RECENT) this.shown = new Set([...this.shown].slice(-4 * RECENT));
    this.show(kind, entry);
  }
}

const idOf = (entry, epoch) => (entry.epoch ?? epoch ? `${entry.epoch ?? epoch}:${entry.sequence}` : null);

/** Read Server-Sent Events from a body, as the HTML standard has them. */
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
