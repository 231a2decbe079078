"use strict"
const list = document.querySelector("nav details")
const wide = matchMedia("(min-width: 75rem)")
const fit = () => { list.open = wide.matches } // beside the text always, above it on demand
wide.addEventListener("change", fit)
list.addEventListener("click", event => { if (event.target.closest("a")) fit() })
fit()
document.querySelector("nav").scrollTop = document.querySelector("nav [aria-current]").offsetTop - 100

for (const block of document.querySelectorAll("main .highlight")) {
  const button = document.createElement("button")
  const say = text => { button.textContent = text }
  button.type = "button"
  button.ariaLive = "polite"
  button.addEventListener("click", async () => {
    const code = block.querySelector("pre")
    try {
      await navigator.clipboard.writeText(code.textContent.trimEnd())
      say("Copied")
    } catch { // not allowed: the reader's keys may
      getSelection().selectAllChildren(code)
      say("Press Ctrl+C")
    }
    setTimeout(say, 2000, "Copy")
  })
  say("Copy")
  block.append(button)
}
