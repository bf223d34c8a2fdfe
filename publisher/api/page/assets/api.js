// Requests to the publisher. The token is kept only in this tab's session storage.

const TOKEN = "broadcache-token";
const RESPONSE_SECONDS = 70; // longer than a confirmation may take

export class ApiProblem extends Error {
  /** `status` is 0 when there was no response; `kind` is the problem document's `type`. */
  constructor(status, title, detail, kind = "") {
    super(detail || title);
    this.status = status;
    this.kind = kind;
    this.title = title;
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/** The access of this page: its right, and the allowed namespaces. */
export const readAccess = (signal) => readJson("/page.json", {}, signal);

export const readReplicas = (namespace, signal) => readJson("/replicas", { namespace }, signal);

export const readHistory = (namespace, limit, signal) => readJson("/invalidations", { namespace, limit }, signal);

export const preview = (body, signal) => post("/invalidations/preview", body, {}, signal);

/** Publish. The same `key` with the same body is published once, however often it is sent. */
export const publish = (body, key, signal) => post("/invalidations", body, { "Idempotency-Key": key }, signal);

/** Remove a silent replica from the list. */
export const forgetReplica = (replica, namespace) =>
  send(`/replicas/${encodeURIComponent(replica)}?${new URLSearchParams({ namespace })}`, { method: "DELETE", signal: within() });

export async function openEvents(namespace, lastEventId, signal) {
  const headers = { Accept: "text/event-stream" };
  if (lastEventId) headers["Last-Event-ID"] = lastEventId;
  return send(`/events?${new URLSearchParams({ namespace })}`, { headers, signal });
}

/** A key for Idempotency-Key. `crypto.randomUUID` needs a secure context. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function readJson(path, parameters, signal) {
  const query = new URLSearchParams(parameters).toString();
  const response = await send(query ? `${path}?${query}` : path, { signal: within(signal) });
  return response.json();
}

async function post(path, body, headers, signal) {
  const response = await send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
    signal: within(signal),
  });
  return response.json();
}

const within = (signal) => AbortSignal.any([...(signal ? [signal] : []), AbortSignal.timeout(RESPONSE_SECONDS * 1_000)]);

/** Send a request and return the response, if it is a result. Otherwise throw ApiProblem. */
async function send(path, options) {
  const headers = new Headers(options.headers);
  if (token.get()) headers.set("Authorization", `Bearer ${token.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (options.signal?.aborted && error.name === "AbortError") throw error;
    throw new ApiProblem(0, "The publisher does not answer", "The publisher does not answer.");
  }
  if (response.ok || hasConfirmation(response)) return response;
  throw await problemOf(response);
}

// The operator chooses the status of a publish that was logged but not confirmed.
const hasConfirmation = (response) => response.headers.get("Content-Type") === "application/json";

async function problemOf(response) {
  try {
    const problem = await response.json();
    const reasons = (problem.reasons ?? []).map((reason) => `${reason.path}: ${reason.detail}`);
    const details = problem.errors?.length ? problem.errors.map((error) => error.detail) : [problem.detail];
    return new ApiProblem(response.status, problem.title, [...details, ...reasons].join("\n"), problem.type);
  } catch {
    return new ApiProblem(response.status, `The publisher answered ${response.status}`, "");
  }
}

/** Wait, or stop waiting when `signal` is aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal.removeEventListener("abort", stop), resolve()), milliseconds);
    signal.addEventListener("abort", stop);
  });
}
