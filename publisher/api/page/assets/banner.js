// The banner: problems that affect reads. It is hidden when there are none.

import { judged } from "./replicas.js";
import { byId, counted, element, listed, seconds, whole } from "./text.js";

export class Banner {
  constructor() {
    this.element = byId("banner");
    this.shown = "";
    this.outage = null;
    this.replicas = [];
  }

  /** `problem` is why the publisher cannot be read; null when it can. */
  setOutage(problem) {
    this.outage = problem;
    this.#show();
  }

  setReplicas(replicas) {
    this.replicas = replicas;
    this.#show();
  }

  #show() {
    const found = this.outage ? outageOf(this.outage) : incoherenceOf(this.replicas);
    const text = JSON.stringify(found);
    if (text === this.shown) return; // screen readers read an alert aloud each time it changes
    this.shown = text;
    this.element.hidden = !found;
    if (!found) return this.element.replaceChildren();
    this.element.dataset.level = found.level;
    const lines = found.lines.map((line) => element("p", {}, line));
    this.element.replaceChildren(element("strong", {}, found.title), ...lines);
  }
}

function outageOf(problem) {
  const isAway = problem.status === 0 || problem.status >= 500;
  const meanwhile = "The page shows the last known state. Replicas keep their staleness bound by themselves: a replica that is cut off stops serving from its cache.";
  return { level: "bad", title: problem.title, lines: [...problem.message.split("\n"), ...(isAway ? [meanwhile] : [])] };
}

function incoherenceOf(replicas) {
  const incoherent = replicas.filter((replica) => !replica.is_coherent);
  if (!incoherent.length) return null;
  const unwell = incoherent.filter((replica) => !replica.gone_since);
  const gone = incoherent.filter((replica) => replica.gone_since);
  const level = incoherent.some((replica) => judged(replica).level === "bad") ? "bad" : "warn";
  const bypassing = unwell.filter((replica) => replica.when_incoherent !== "serve");
  const serving = unwell.filter((replica) => replica.when_incoherent === "serve");
  return {
    level,
    title: `${whole(incoherent.length)} of ${counted(replicas.length, "replica")} not proven up to date: ${listed(incoherent.map(nameOf))}`,
    lines: [
      ...(gone.length ? [goneLine(gone)] : []),
      ...(serving.length ? [`${listed(serving.map(nameOf))} may serve old values: set to serve while incoherent.`] : []),
      ...(bypassing.length ? [bypassingLine(bypassing)] : []),
    ],
  };
}

function goneLine(replicas) {
  return `${listed(replicas.map(nameOf))}: disappeared without a clean shutdown (killed, frozen or cut off). A replica that returns catches up before it serves from its cache.`;
}

function bypassingLine(replicas) {
  const bounds = replicas.map((replica) => replica.max_staleness_seconds).filter((bound) => bound !== null);
  const bound = bounds.length ? ` of ${seconds(Math.max(...bounds))}` : "";
  return `${listed(replicas.map(nameOf))}: beyond the bound${bound} nothing is served from the cache; reads go to the source until it has caught up.`;
}

const nameOf = (replica) => replica.replica;
