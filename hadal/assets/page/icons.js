// The icons: one path each on a field of 24 by 24, drawn as a line.

const disc = (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0-${2 * r} 0`;

export const PATHS = {
  again: "M18.5 9A7 7 0 1 0 19 13.5M19 4.5V9h-4.5",
  alert: `${disc(12, 12, 8)}M12 8v4.5m0 3v.2`,
  check: "m5 12.5 4.5 4.5L19 7.5",
  clip: "m19 11-7.2 7.2a4.3 4.3 0 0 1-6-6L13 5a2.9 2.9 0 0 1 4 4l-7.1 7.1a1.4 1.4 0 0 1-2-2L14.5 7.5",
  close: "m7 7 10 10M17 7 7 17",
  copy: "M9 10.5A1.5 1.5 0 0 1 10.5 9H19v10H9zM15 9V5H6.5A1.5 1.5 0 0 0 5 6.5V15h4",
  down: "M12 5v14m-6-6 6 6 6-6",
  edit: "M5 19l.8-3.6 9.8-9.8a1.6 1.6 0 0 1 2.3 0l.5.5a1.6 1.6 0 0 1 0 2.3l-9.8 9.8z",
  file: "M7 4.5h6.5l4 4v11H7zM13 4.5V9h4.5",
  left: "m14 7-5 5 5 5",
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  pulse: "M3 13h4l2.5-7L14 18l2.5-5H21",
  right: "m10 7 5 5-5 5",
  send: "M12 19V5m-6 6 6-6 6 6",
  sliders: `M4 8h9m5 0h2M4 16h2m5 0h9${disc(15.5, 8, 2.5)}${disc(8.5, 16, 2.5)}`,
  stop: "M8 8h8v8H8z",
  theme: `${disc(12, 12, 8)}M12 4v16m2-15.5v15m2-14v13m2-11v9`,
  tool: "m9 8-4 4 4 4m6-8 4 4-4 4",
  trash: "M5 7.5h14m-9 0v-2h4v2m-7 0 .7 11h8.6l.7-11M10.5 11v4.5m3-4.5v4.5",
};
