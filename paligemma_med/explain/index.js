"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const rows = [...$("rows").rows].map(row => ({
    row, flags: JSON.parse(row.dataset.flags), text: row.textContent.toLowerCase(),
  }));

  function filter() {
    const flag = $("flag").value, words = $("words").value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const { row, flags, text } of rows) {
      const fits = (!flag || flags.includes(flag)) && words.every(w => text.includes(w));
      row.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = shown === rows.length ? `${shown} answers` : `${shown} of ${rows.length} answers`;
  }
  $("flag").addEventListener("change", filter);
  $("words").addEventListener("input", filter);
})();
