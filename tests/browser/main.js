// All tests: `tests/browser/run`, or one of them: `tests/browser/run --test-name-pattern='a hidden tab'`.

import "./access.js";
import "./account.js";
import "./hostile.js";
import "./job.js";
import "./jobs.js";
import "./large.js";
import "./policy.js";
import "./proxy.js";
import "./share.js";
