-- One echo: register the replica, read the heads, and send the replica a probe through the publish path.
--
-- It writes, so that only a primary runs it: a server that was demoted refuses, and the replica learns of that.
--
-- KEYS  for each namespace three:
--       head      hash {epoch, seq, digest, digest_seq, lease_ms}. It is created if missing, to tell "never published
--                 to" from "lost". `lease_ms` is the longest lifetime of a registration so far: for that long after a
--                 loss of the registry, an unlisted replica may serve from its caches.
--       presence  the status of the replica. It outlives the registration by a day, so that the last status of a
--                 replica that fell silent can be read.
--       registry  sorted set of the replicas that have not left. The score is when the registration ends, on this
--                 server's clock in ms, plus the replica's marks. A registration lasts until after the next echo is due
--                 and every earlier proof has run out; for a day after that the replica is silent. Members that begin
--                 with a space are no replicas: ` since=<ms>` is the time of creation, with a score that is never
--                 reached; the score of ` forgotten` is until when a silent replica that may serve from its caches
--                 would be listed, had there not been too many.
-- ARGV  channel of the probe, the probe
--       PUBLISH, or in a cluster SPUBLISH
--       replica, lifetime of its registrations in ms
--       epoch, for namespaces that have none
--       token of this life of the replica: another one in the presence is that of another process
--       marks, a digit for each namespace: 2 if the replica serves nothing beyond its registration, 1 if another
--       process has its id, 3 for both; a quarter of the digit is added to the score
--       presences as JSON, one for each namespace; an empty one renews the lifetime of the presence that is there
--
-- Returns {replication id, complaint, others, epoch, seq, digest, digest_seq, 1 or 0, epoch, …}. A digest is false where
-- there is none, 0 says that the presence to renew was gone, and the complaint is empty unless the replica could not be
-- registered. `others` has three elements for each namespace in which another process has written the replaced presence,
-- or has left: the number of the namespace, how many ms that registration had left, and the replaced presence. It is
-- empty where a presence was renewed and another process has marked the registration.

local EXPIRED_MAX, FORGOTTEN_MAX, SILENT_MAX, DAY_MS, NEVER_MS = 16, 100, 1000, 86400000, 9e15
local replica, lifetime_ms, life, marks = ARGV[4], tonumber(ARGV[5]), ARGV[7], ARGV[8]

local complaint = ''
-- A failure to register the replica must not cost it its proof.
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    complaint = answer.err
    return nil
  end
  return answer
end

local function integer(number)
  return string.format('%.0f', number)
end

local heads, others, leases_ms = {}, {}, {}
for i = 1, #KEYS, 3 do
  local presence, kept_ms, has_presence = ARGV[8 + (i + 2) / 3], integer(lifetime_ms + DAY_MS), 1
  if presence == '' then
    has_presence = redis.call('PEXPIRE', KEYS[i + 1], kept_ms)
    others[i] = ''
  else
    local before = redis.pcall('SET', KEYS[i + 1], presence, 'PX', kept_ms, 'GET')
    if type(before) == 'table' and before.err then
      redis.call('SET', KEYS[i + 1], presence, 'PX', kept_ms)
    elseif before and (before:match('"life":"(%w+)"') ~= life or before:find('"left":"%w')) then
      others[i] = before
    end
  end
  local head = redis.pcall('HMGET', KEYS[i], 'epoch', 'seq', 'digest', 'digest_seq', 'lease_ms')
  if head.err and not head.err:find('WRONGTYPE') then
    return redis.error_reply(head.err)
  end
  local epoch, seq, lease_ms = head[1], head[2], tonumber(head[5] or 0) or 0
  -- A value that another program wrote, and that is no position in a log, is not a head.
  if not (epoch and epoch:match('^[%w._-]+$') and seq and seq:match('^%d+$') and tonumber(seq) < 2 ^ 53 - 1) then
    if head.err or epoch then
      redis.call('DEL', KEYS[i])
    end
    redis.call('HSET', KEYS[i], 'epoch', ARGV[6], 'seq', 0, 'digest', '', 'digest_seq', 0)
    head = {ARGV[6], '0', '', '0'}
  end
  if lifetime_ms > lease_ms then
    try('HSET', KEYS[i], 'lease_ms', ARGV[5])
  end
  leases_ms[i] = math.min(math.max(lifetime_ms, lease_ms), DAY_MS)
  for field = 1, 4 do
    heads[#heads + 1] = head[field]
  end
  heads[#heads + 1] = has_presence
end
redis.call(ARGV[3], ARGV[1], ARGV[2])

-- Too many are silent: forget the oldest, and remember that, if one of them may serve from its caches.
local function forget_some(registry, presence_prefix, now)
  local excess = try('ZRANGEBYSCORE', registry, '-inf', now, 'LIMIT', SILENT_MAX, FORGOTTEN_MAX)
  if not excess or #excess == 0 then
    return
  end
  local oldest = try('ZRANGEBYSCORE', registry, '-inf', now, 'WITHSCORES', 'LIMIT', 0, #excess)
  local members, presences, ended_ms = {}, {}, nil
  for n = 1, #(oldest or {}), 2 do
    members[#members + 1] = oldest[n]
    presences[#presences + 1] = presence_prefix .. oldest[n]
    local score = tonumber(oldest[n + 1])
    if score % 1 ~= 0.5 and oldest[n]:sub(1, 1) ~= ' ' then
      ended_ms = score
    end
  end
  if #members > 0 then
    try('ZREM', registry, unpack(members))
    try('DEL', unpack(presences))
  end
  if ended_ms then
    try('ZADD', registry, integer(ended_ms + DAY_MS), ' forgotten')
  end
end

local time, answer_others = try('TIME'), {}
if time then
  local now_ms, is_tidying = time[1] * 1000 + math.floor(time[2] / 1000), time[2] % 16 == 0
  for i = 3, #KEYS, 3 do
    local number = i / 3
    local mark = tonumber(marks:sub(number, number))
    local before = others[i - 2]
    if before then
      -- Returns the score and changes nothing.
      local ends_ms = tonumber(try('ZADD', KEYS[i], 'XX', 'INCR', 0, replica) or 0)
      local left_ms = math.max(0, math.floor(ends_ms) - now_ms)
      local is_other = before:match('"life":"(%w+)"') ~= life
      if before == '' then
        -- This process has not marked its registration, or it would not have renewed the presence.
        is_other = left_ms > 0 and ends_ms % 0.5 == 0.25
      end
      if is_other or before ~= '' then
        for _, field in ipairs({number, left_ms, before}) do
          answer_others[#answer_others + 1] = field
        end
      end
      -- Beyond its registration it serves nothing only if it has said so.
      local may_serve = left_ms > 0 or (ends_ms > 0 and ends_ms % 1 ~= 0.5)
      if is_other and may_serve and mark % 2 == 0 then
        mark = mark + 1
      end
    end
    local added = try('ZADD', KEYS[i], string.format('%.2f', now_ms + lifetime_ms + mark / 4), replica)
    if added == 1 then
      local since = try('ZRANGEBYSCORE', KEYS[i], integer(NEVER_MS), '+inf', 'LIMIT', 0, 1)
      if since and #since == 0 then
        try('ZADD', KEYS[i], integer(NEVER_MS), ' since=' .. integer(now_ms))
      end
      forget_some(KEYS[i], KEYS[i - 1]:sub(1, -1 - #replica), integer(now_ms))
    end
    -- Not with each echo: the registry outlives the leases by a day, and expired members are told by their scores.
    -- A few at a time: each new member has some removed, so they do not accumulate.
    if added == 1 or is_tidying then
      local expired = try('ZRANGEBYSCORE', KEYS[i], '-inf', integer(now_ms - DAY_MS), 'LIMIT', 0, EXPIRED_MAX)
      if expired and #expired > 0 then
        try('ZREM', KEYS[i], unpack(expired))
      end
      try('PEXPIRE', KEYS[i], integer(leases_ms[i - 2] + DAY_MS))
    end
  end
end

-- A user without the right to INFO gets no replication id; its replicas then clear with each new subscription.
local info = redis.pcall('INFO', 'replication')
local answer = {type(info) == 'string' and info:match('master_replid:(%x+)') or '', complaint, answer_others}
for i = 1, #heads do
  answer[#answer + 1] = heads[i]
end
return answer
