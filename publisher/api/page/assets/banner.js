// The banner: problems that affect reads. It is hidden when there are none.

import { judged } from "./replicas.js";
import { byId, counted, element, lastWord, listed, seconds, whole } from "./text.js";

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
  const incoherent = replicas.filter((replica) => !replica.is_coherent || replica.conflict);
  if (!incoherent.length) return null;
  const shared = incoherent.filter((replica) => replica.conflict && !replica.is_silent);
  const unwell = incoherent.filter((replica) => !replica.is_silent && !replica.is_coherent);
  const silent = incoherent.filter((replica) => replica.is_silent);
  const level = incoherent.some((replica) => judged(replica).level === "bad") ? "bad" : "warn";
  const bypassing = unwell.filter((replica) => replica.when_incoherent !== "serve");
  const serving = unwell.filter((replica) => replica.when_incoherent === "serve");
  return {
    level,
    title: `${whole(incoherent.length)} of ${counted(replicas.length, "replica")} not proven up to date: ${listed(incoherent.map(nameOf))}`,
    lines: [
      ...(silent.length ? silentLines(silent) : []),
      ...shared.map((replica) => `${replica.replica} is the id of several processes, also of ${replica.conflict}: each confirms for the other. Give each process an id of its own.`),
      ...(serving.length ? [`${listed(serving.map(nameOf))} may serve old values: set to serve while incoherent.`] : []),
      ...(bypassing.length ? [bypassingLine(bypassing)] : []),
    ],
  };
}

/** Not how long ago: an alert that changes is read aloud again. */
function silentLines(replicas) {
  const said = replicas.slice(0, 3).map((replica) => `${replica.replica} ${lastWord(replica)}`).join("; ");
  const more = replicas.length > 3 ? `; and ${whole(replicas.length - 3)} more` : "";
  const serving = replicas.filter((replica) => replica.may_serve);
  return [
    `Fell silent without a clean shutdown (killed, frozen or cut off): ${said}${more}.`,
    ...(serving.length ? [`${listed(serving.map(nameOf))} may serve old values until stopped: set to serve while incoherent.`] : []),
    ...(serving.length < replicas.length ? ["The others serve nothing from their caches until they have caught up."] : []),
    "Forget those that have ended for good.",
  ];
}

function bypassingLine(replicas) {
  const bounds = replicas.map((replica) => replica.max_staleness_seconds).filter((bound) => bound !== null);
  const bound = bounds.length ? ` of ${seconds(Math.max(...bounds))}` : "";
  return `${listed(replicas.map(nameOf))}: beyond the bound${bound} nothing is served from the cache; reads go to the source until it has caught up.`;
}

const nameOf = (replica) => replica.replica;
