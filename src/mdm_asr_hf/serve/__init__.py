# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr serve`: OpenAI's audio API over HTTP, and live audio over WebSockets. Needs the extra `serve`."""
