// The operators' page: the replicas, how stale each can be, the invalidations, and a form to send one.

import { ApiProblem, forgetReplica, pause, readAccess, readReplicas, token } from "./api.js";
import { Banner } from "./banner.js";
import { follow } from "./events.js";
import { InvalidationForm } from "./form.js";
import { ReplicaGrid } from "./replicas.js";
import { Stream } from "./stream.js";
import { byId, element, setText } from "./text.js";

const POLL_MS = 1_000; // replicas send an echo about once a second
const POLL_MS_MAX = 10_000;

const banner = new Banner();
const grid = new ReplicaGrid(forget);
const stream = new Stream();
const form = new InvalidationForm();
let shown = new AbortController();
let here = { namespace: "", right: null };

/** Query the access of this page, then show a namespace, or ask for a token. */
async function begin() {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  try {
    const access = await untilAvailable(() => readAccess(signal), signal);
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

async function untilAvailable(request, signal) {
  for (let waitMs = POLL_MS; ; waitMs = Math.min(POLL_MS_MAX, waitMs * 2)) {
    try {
      const response = await request();
      banner.setOutage(null);
      return response;
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      banner.setOutage(error);
      showLink("lost");
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
  showLink("waiting", "waiting for a token");
}

/** The namespace in the address, or the default; where namespaces are limited, offer them for selection. */
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
  here = { namespace, right };
  form.begin(namespace, right);
  ended(watchReplicas(namespace, signal), signal);
  ended(follow(namespace, { show: (kind, entry) => stream.show(kind, entry), report: showFollowing, signal }), signal);
}

/** Dismiss a silent replica; the next reading shows the result. */
async function forget(replica) {
  try {
    await forgetReplica(replica, here.namespace);
  } catch (error) {
    if (!(error instanceof ApiProblem)) throw error;
    if (error.status !== 404) banner.setOutage(error);
  }
}

/** Report the failure of a task that was not aborted. */
function ended(work, signal) {
  work.catch((error) => {
    if (!signal.aborted) throw error;
  });
}

async function watchReplicas(namespace, signal) {
  let waitMs = POLL_MS;
  while (true) {
    try {
      const { replicas } = await readReplicas(namespace, signal);
      banner.setOutage(null);
      if (signal.aborted) return;
      grid.show(replicas, here.right === "rw");
      banner.setReplicas(replicas);
      form.setReplicas(replicas);
      waitMs = POLL_MS;
    } catch (error) {
      if (!(error instanceof ApiProblem)) throw error;
      if (error.status === 401) return begin();
      banner.setOutage(error);
      waitMs = Math.min(POLL_MS_MAX, waitMs * 2);
    }
    await pause(waitMs, signal);
    await untilVisible(signal);
  }
}

/** A hidden page sends no requests. */
function untilVisible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve, reject) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

function showFollowing(state) {
  const words = { live: "live", polling: "live, every 2 s", lost: "no events arrive" };
  showLink(state === "lost" ? "lost" : "live", words[state]);
}

function showLink(state, text = "the publisher does not answer") {
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
