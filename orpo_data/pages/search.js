"use strict";
// Narrows the rows on this page to those that hold every word. The page is whole without it.
(() => {
  const panel = document.getElementById("search");
  const [words, open, count] = ["words", "open", "count"].map((name) => panel.querySelector(`[data-is=${name}]`));
  const groups = [...document.querySelectorAll("#rows .group")].map((group) => ({
    group,
    rows: [...group.querySelectorAll("details.row")].map((row) => ({ row, text: row.textContent.toLowerCase() })),
  }));
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    let all = 0;
    for (const { group, rows } of groups) {
      let here = 0;
      for (const { row, text } of rows) {
        row.hidden = !wanted.every((word) => text.includes(word));
        here += !row.hidden;
      }
      group.hidden = here === 0;
      found += here;
      all += rows.length;
    }
    count.textContent = wanted.length ? `${found} of ${all} rows` : `${all} rows`;
  };
  const follow = () => {
    const asked = new URLSearchParams(location.hash.slice(1)).get("find");
    if (asked !== null) {
      words.value = asked;
      panel.scrollIntoView();
    }
    show();
  };
  open.addEventListener("click", () => {
    const rows = document.querySelectorAll("#rows details.row:not([hidden])");
    const closed = [...rows].some((row) => !row.open);
    for (const row of rows) row.open = closed;
  });
  words.addEventListener("input", show);
  addEventListener("hashchange", follow);
  panel.hidden = false;
  follow();
})();
