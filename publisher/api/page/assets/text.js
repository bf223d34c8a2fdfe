// Elements and words. Untrusted text (names, keys, reasons) reaches the page only through textContent.

export const byId = (id) => document.getElementById(id);

/** Make an element; `content` is texts and elements. */
export function element(tag, attributes = {}, ...content) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

export function drawing(tag, attributes = {}, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

/** Set text only if it differs: unchanged text is neither painted nor read aloud again. */
export function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

export function setAttribute(where, name, value) {
  if (where.getAttribute(name) !== value) where.setAttribute(name, value);
}

/** `1 replica`, `3 replicas`, `1,200 entries` */
export function counted(count, one, many = `${one}s`) {
  return `${whole(count)} ${count === 1 ? one : many}`;
}

export const whole = (number) => Math.round(number).toLocaleString("en");

export function seconds(value) {
  if (value === null) return "unknown";
  return value < 100 ? `${value.toFixed(1)} s` : `${whole(value / 60)} min`;
}

export function milliseconds(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size >= 1_000) return `${(value / 1_000).toFixed(size < 10_000 ? 1 : 0)} s`;
  return `${size < 10 ? value.toFixed(1) : whole(value)} ms`;
}

export const percent = (ratio) => (ratio === null ? "–" : `${(ratio * 100).toFixed(ratio > 0.995 && ratio < 1 ? 1 : 0)} %`);

/** The time of day in the user's time zone. */
export function timeOfDay(date) {
  return date.toLocaleTimeString("en-GB");
}

/** `a, b and 3 more` */
export function listed(names, most = 5) {
  const shown = names.slice(0, most).join(", ");
  return names.length > most ? `${shown} and ${whole(names.length - most)} more` : shown;
}

/** `last seen 17:04:09, has not dropped #7`: of a silent replica. */
export function lastWord({ replica, seen_ms_ago, behind, position }) {
  const seen = seen_ms_ago === null ? "last seen at an unknown time" : `last seen ${momentOf(replica, seen_ms_ago)}`;
  if (!behind || !position) return seen;
  const first = position.sequence + 1;
  const last = position.sequence + behind;
  return `${seen}, has not dropped #${first}${first === last ? "" : ` to #${last}`}`;
}

const moments = new Map();

/** The same moment has the same text with each reading, whatever the latency of the reading is. */
function momentOf(replica, msAgo) {
  const read = Date.now() - msAgo;
  const before = moments.get(replica);
  if (before === undefined || Math.abs(before - read) > 2_000) moments.set(replica, read);
  const moment = new Date(moments.get(replica));
  return msAgo < 43_200_000 ? timeOfDay(moment) : moment.toLocaleString("en-GB");
}
