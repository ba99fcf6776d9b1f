// Lines from the parts of an image to the classes that they vote for.

// Up to so many equal shares, a share is equal but for rounding.
export const EVEN = 1.005;

// How much each part votes for each class beyond an equal share, over the most that any does in any iteration.
export function excesses(shares, presence, classes) {
  const strongest = Math.max(...presence, 1e-9), equal = 1 / classes;
  const found = shares.map(parts => parts.map((row, p) =>
    row.map(share => share < EVEN * equal ? 0 : (share - equal) * presence[p] / strongest)));
  const most = Math.max(...found.flat(2));
  return most > 0 ? found.map(parts => parts.map(row => row.map(value => value / most))) : found;
}

// starts: [x, y] of each part; ends: [x, y] of each class, or null where it is not shown; colors: of a line.
export function drawLines(canvas, starts, ends, strengths, presence, {chosen, accent, soft}) {
  const ratio = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  const context = canvas.getContext("2d"), strongest = Math.max(...presence, 1e-9);
  context.scale(ratio, ratio);
  for (const isChosen of [false, true]) {  // those of the chosen class above the others
    context.strokeStyle = isChosen ? accent : soft;
    starts.forEach(([x, y], p) => ends.forEach((end, j) => {
      if (!end || (j === chosen) !== isChosen) return;
      const strength = strengths[p][j];
      context.globalAlpha = Math.min(1, .05 * presence[p] / strongest + .85 * strength);
      context.lineWidth = .6 + 1.8 * strength;
      const middle = (x + end[0]) / 2;
      context.beginPath();
      context.moveTo(x, y);
      context.bezierCurveTo(middle, y, middle, end[1], ...end);
      context.stroke();
    }));
  }
  context.globalAlpha = 1;
  context.fillStyle = accent;
  starts.forEach(([x, y], p) => {
    context.globalAlpha = .25 + .75 * presence[p] / strongest;
    context.beginPath();
    context.arc(x, y, 1.6, 0, 7);
    context.fill();
  });
}
