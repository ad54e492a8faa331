// The form that asks for the page's key. The key goes into one request and is kept nowhere; the answer sets a cookie.
import { asked } from "./net.js";

const form = document.getElementById("form");
const key = document.getElementById("key");
const wrong = document.getElementById("wrong");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  wrong.hidden = true;
  try {
    await asked("api/key", { key: key.value });
    location.reload();
  } catch (fault) {
    wrong.textContent = fault.message;
    wrong.hidden = false;
    key.select();
  }
});
