// What the pages owe to a keyboard and to a screen reader, and the generators leave out.
const SCROLLING = "pre, .table-wrapper, .output, .output_html, mjx-container[display=true]";

function openToTheKeyboard() {
  for (const box of document.querySelectorAll(SCROLLING)) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
  }
}

function nameTheParts() {
  document.querySelector("aside.sidebar-drawer")?.setAttribute("aria-label", "All pages");
  document.querySelector("aside.toc-drawer")?.setAttribute("aria-label", "On this page");
  for (const part of document.querySelectorAll(".sig dl, .sig dl > dd")) part.role = "presentation"; // lines, no terms
}

document.addEventListener("DOMContentLoaded", () => {
  nameTheParts();
  openToTheKeyboard();
});
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  openToTheKeyboard();
});
window.addEventListener("resize", openToTheKeyboard);
