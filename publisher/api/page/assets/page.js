// The operators' page: who is there, how stale each can be, what was invalidated, and invalidating.

import { ApiProblem, pause, readAccess, readReplicas, token } from "./api.js";
import { Banner } from "./banner.js";
import { follow } from "./events.js";
import { InvalidationForm } from "./form.js";
import { ReplicaGrid } from "./replicas.js";
import { Stream } from "./stream.js";
import { byId, element, setText } from "./text.js";

const LOOK_MS = 1_000; // replicas say something new about once a second
const LOOK_MS_MAX = 10_000;

const banner = new Banner();
const grid = new ReplicaGrid();
const stream = new Stream();
const form = new InvalidationForm();
let shown = new AbortController();

/** Ask what may be done here, then show a namespace, or ask for a token. */
async function begin() {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  try {
    const access = await untilAnswered(() => readAccess(signal), signal);
    byId("token-section").hidden = access.right !== null;
    byId("content").hidden = access.right === null;
    byId("token-forget").hidden = token.get() === null;
    if (access.right === null) return askForToken();
    setText(byId("token-wrong"), "");
    show(chooseFrom(access), access.right, signal);
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}

async function untilAnswered(ask, signal) {
  for (let waitMs = LOOK_MS; ; waitMs = Math.min(LOOK_MS_MAX, waitMs * 2)) {
    try {
      const answer = await ask();
      banner.setOutage(null);
      return answer;
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      banner.setOutage(error);
      tellLink("lost");
    }
    await pause(waitMs, signal);
  }
}

function askForToken() {
  const wrong = byId("token-wrong");
  wrong.hidden = token.get() === null;
  setText(wrong, token.get() === null ? "" : "This token is not valid. Ask the operator for one.");
  token.forget();
  byId("token-forget").hidden = true;
  banner.setReplicas([]);
  tellLink("waiting", "waiting for a token");
}

/** The namespace of the address bar, or the first there is; the choice is offered where it is limited. */
function chooseFrom({ namespaces, default_namespace }) {
  const asked = new URLSearchParams(location.search).get("namespace") || default_namespace;
  const isLimited = namespaces.length > 0;
  const chosen = isLimited && !namespaces.includes(asked) ? namespaces[0] : asked;
  const select = byId("namespace-select");
  select.hidden = !isLimited;
  byId("namespace").hidden = byId("namespace-show").hidden = isLimited;
  document.querySelector("#namespace-form label").htmlFor = isLimited ? select.id : "namespace";
  select.replaceChildren(...namespaces.map((name) => element("option", { value: name }, name)));
  select.value = chosen;
  byId("namespace").value = chosen;
  return chosen;
}

function show(namespace, right, signal) {
  document.title = `${namespace} · broadcache`;
  grid.clear();
  stream.clear();
  banner.setReplicas([]);
  form.begin(namespace, right);
  ended(watchReplicas(namespace, signal), signal);
  ended(follow(namespace, { show: (kind, entry) => stream.show(kind, entry), tell: tellFollowing, signal }), signal);
}

/** What ends otherwise than by being told to has a bug, or lacks the right it had. */
function ended(work, signal) {
  work.catch((error) => {
    if (!signal.aborted) throw error;
  });
}

async function watchReplicas(namespace, signal) {
  let waitMs = LOOK_MS;
  while (true) {
    try {
      const { replicas } = await readReplicas(namespace, signal);
      banner.setOutage(null);
      banner.setReplicas(grid.show(replicas));
      form.setReplicas(replicas);
      waitMs = LOOK_MS;
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      if (error.status === 401) return begin();
      banner.setOutage(error);
      waitMs = Math.min(LOOK_MS_MAX, waitMs * 2);
    }
    await pause(waitMs, signal);
    await untilVisible(signal);
  }
}

/** A page that nobody looks at asks for nothing. */
function untilVisible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve, reject) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

function tellFollowing(state) {
  const words = { live: "live", polling: "live, every 2 s", lost: "no events arrive" };
  tellLink(state === "lost" ? "lost" : "live", words[state]);
}

function tellLink(state, text = "the publisher does not answer") {
  byId("link").dataset.state = state;
  setText(byId("link-text"), text);
}

function choose(namespace) {
  const address = new URL(location);
  address.searchParams.set("namespace", namespace);
  history.replaceState(null, "", address);
  begin();
}

byId("namespace-form").addEventListener("submit", (event) => {
  event.preventDefault();
  choose(byId("namespace").value.trim());
});
byId("namespace-select").addEventListener("change", (event) => choose(event.target.value));
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(byId("token").value.trim());
  byId("token").value = "";
  begin();
});
byId("token-forget").addEventListener("click", () => {
  token.forget();
  begin();
});

begin();
