// All tests: `tests/browser/run`, or one of them: `tests/browser/run --test-name-pattern='a hidden tab'`.

import "./account.js";
import "./job.js";
import "./share.js";
