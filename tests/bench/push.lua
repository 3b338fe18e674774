-- wrk script: signed pushes, each with an id of its own, and a count of every answer that is not 200 `success`.
--
-- Arguments after `--`, each KEY=VALUE:
--   format=xml|json     how the body is written
--   close=0|1           1 sends `Connection: close`
--   query=QUERY         the signed query string; the signature does not cover the body, so one serves them all
--   batch=DIGITS        up to 8 digits that no other run against the same server uses: they begin every MsgId
--   file=PATH           send these pushes in turn instead (safe mode): one a line, query TAB body
--   threads=N           wrk's --threads, so that the threads share the file out between them
--
-- Prints one line, `BENCH ` and a JSON object, when done.

local SENDERS = 1000

local XML = '<xml>\n<ToUserName><![CDATA[bench-app]]></ToUserName>\n'
  .. '<FromUserName><![CDATA[openid-%s]]></FromUserName>\n<CreateTime>1482048670</CreateTime>\n'
  .. '<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA[你好，我的订单什么时候发货？]]></Content>\n'
  .. '<MsgId>%s</MsgId>\n</xml>'

local JSON = '{"ToUserName": "bench-app", "FromUserName": "openid-%s", "CreateTime": 1482048670, '
  .. '"MsgType": "text", "Content": "你好，我的订单什么时候发货？", "MsgId": %s}'

-- Each wrk thread, and the phase that runs setup() and done(), has a Lua state of its own; `threads` belongs to the
-- latter, the rest to the former. Globals are what thread:get() can read.
local threads = {}
local settings = { format = "xml", close = "0", query = "", batch = "1", threads = "1" }
local template, lines, step
sent, wrong, repeats, first_wrong = 0, 0, 0, ""

local function head(query)
  local kind = settings.format == "json" and "application/json" or "text/xml"
  local close = settings.close == "1" and "Connection: close\r\n" or ""
  return "POST /?" .. query .. " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: " .. kind .. "\r\n" .. close
end

local function complete(query, body)
  return head(query) .. "Content-Length: " .. #body .. "\r\n\r\n" .. body
end

-- The id and the sender have fixed widths, so the head, Content-Length included, is the same for all: only
-- string.format() is left to do for each request.
local function prepare_template()
  local body = settings.format == "json" and JSON or XML
  local id = settings.batch .. string.format("%02d", thread_index) .. "00000000"
  local length = #string.format(body, "000", id)
  -- The query has no per cent sign of its own: it is made of hex digits and names.
  return head(settings.query) .. "Content-Length: " .. length .. "\r\n\r\n" .. body
end

local function read_lines(path)
  local found = {}
  for line in io.lines(path) do
    local query, body = line:match("^(.-)\t(.*)$")
    found[#found + 1] = complete(query, body)
  end
  return found
end

function setup(thread)
  thread:set("thread_index", #threads)
  threads[#threads + 1] = thread
end

function init(args)
  for _, argument in ipairs(args) do
    local key, value = argument:match("^(%w+)=(.*)$")
    settings[key] = value
  end
  step = tonumber(settings.threads)
  if settings.file then
    lines = read_lines(settings.file)
  else
    template = prepare_template()
  end
end

local function next_line()
  local position = thread_index + sent * step
  if position >= #lines then repeats = repeats + 1 end
  sent = sent + 1
  return lines[position % #lines + 1]
end

function request()
  if lines then return next_line() end
  sent = sent + 1
  local id = settings.batch .. string.format("%02d%08d", thread_index, sent)
  return string.format(template, string.format("%03d", sent % SENDERS), id)
end

function response(status, headers, body)
  if status ~= 200 or body ~= "success" then
    wrong = wrong + 1
    if wrong == 1 then first_wrong = status .. " " .. body:sub(1, 80) end
  end
end

local function total(name)
  local sum = 0
  for _, thread in ipairs(threads) do sum = sum + thread:get(name) end
  return sum
end

-- Of all threads, the first wrong answer; kept to plain characters, so that it needs no escaping in JSON.
local function example()
  for _, thread in ipairs(threads) do
    local text = thread:get("first_wrong")
    if text ~= "" then return (text:gsub("[^%w %.,:;<>/_-]", "?")) end
  end
  return ""
end

function done(summary, latency, requests)
  local errors = summary.errors
  local socket_errors = errors.connect + errors.read + errors.write
  local line = 'BENCH {"requests": %d, "microseconds": %d, "p50_us": %d, "p99_us": %d, "wrong": %d, "example": "%s", '
    .. '"socket_errors": %d, "timeouts": %d, "repeats": %d}'
  print(string.format(line, summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    total("wrong"), example(), socket_errors, errors.timeout, total("repeats")))
end
