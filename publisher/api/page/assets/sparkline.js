// The lag of one replica over the last minute, as a line.

import { drawing, milliseconds, setAttribute } from "./text.js";

const SAMPLES_MAX = 60;
const WIDTH = SAMPLES_MAX - 1;
const HEIGHT = 22;

export class Sparkline {
  constructor() {
    this.samples = [];
    this.path = drawing("path");
    const floor = drawing("line", { x1: 0, y1: HEIGHT - 0.5, x2: WIDTH, y2: HEIGHT - 0.5 });
    this.element = drawing(
      "svg",
      { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      floor,
      this.path,
    );
    this.add(null);
  }

  /** Add a sample in milliseconds; null where nothing was measured yet. */
  add(lagMs) {
    this.samples = [...this.samples, lagMs].slice(-SAMPLES_MAX);
    const known = this.samples.filter((sample) => sample !== null);
    const highest = Math.max(1, ...known);
    const lowest = Math.min(0, ...known);
    const height = (sample) => HEIGHT - 2 - ((sample - lowest) / (highest - lowest)) * (HEIGHT - 4);
    setAttribute(this.path, "d", lineThrough(this.samples, height));
    const label = known.length
      ? `Lag: ${milliseconds(known.at(-1))}, at most ${milliseconds(Math.max(...known))} lately`
      : "Lag: not measured yet";
    setAttribute(this.element, "aria-label", label);
  }
}

function lineThrough(samples, height) {
  const left = SAMPLES_MAX - samples.length;
  const points = samples.map((sample, place) => (sample === null ? null : `${left + place},${height(sample).toFixed(1)}`));
  return points
    .map((point, place) => (point === null ? "" : `${place && points[place - 1] !== null ? "L" : "M"}${point}`))
    .join("");
}
