// What every page has: a theme, tables that sort, commands to copy, and light colours on paper.
(function () {
  "use strict";
  const root = document.documentElement;
  let printing = false;

  // ---- theme ---------------------------------------------------------------------------------------------------
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const THEMES = ["system", "light", "dark"];
  let theme = "system";
  try { theme = THEMES.includes(localStorage.getItem("secateur-theme")) ? localStorage.getItem("secateur-theme") : "system"; } catch { /* a file opened from disk may have no storage */ }
  function applyTheme() {
    const night = !printing && (theme === "dark" || (theme === "system" && dark.matches));
    root.dataset.theme = night ? "dark" : "light";
    const button = document.getElementById("theme");
    button.querySelector(".text").textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", "Theme: " + theme + ". Press to change.");
  }
  const themeButton = document.getElementById("theme");
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem("secateur-theme", theme); } catch { /* kept for this page alone */ }
    applyTheme();
    root.dispatchEvent(new Event("repaint"));
  });
  dark.addEventListener("change", () => { applyTheme(); root.dispatchEvent(new Event("repaint")); });

  applyTheme();
  window.addEventListener("beforeprint", () => { printing = true; applyTheme(); });
  window.addEventListener("afterprint", () => { printing = false; applyTheme(); });

  // ---- tables --------------------------------------------------------------------------------------------------
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
    heads.forEach((head, column) => {
      const numeric = Array.from(body.rows).some((row) => row.cells[column].dataset.value !== undefined);
      if (numeric) head.classList.add("number");
      head.firstElementChild.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", other === head ? (rising ? "ascending" : "descending") : "none"));
        const key = (row) => { const cell = row.cells[column]; return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim(); };
        const absent = (value) => value === "–" || value === "" || Number.isNaN(value);
        const rows = Array.from(body.rows).sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (absent(x) || absent(y)) return absent(x) - absent(y);
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
          return rising ? order : -order;
        });
        body.append(...rows);
      });
    });
  });

  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(button.previousElementSibling.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(button.previousElementSibling); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }));
})();
