import "./watch.js";
import "./publisher.js";
import "./truncated.js";
import "./programs.js";
import "./browser.js";
