-- Forget a namespace: remove its head, log, registry and all else, unless replicas of it may serve from their caches.
--
-- A replica that comes later finds a head with another epoch, and drops everything: also one that was frozen meanwhile.
--
-- KEYS  head, log and registry, as in append.lua and echo.lua
--       other keys of the namespace: receipts, presences, the head and log of an older version
-- ARGV  beginning of the keys of presences
--
-- Returns {number of removed keys, registered replicas, silent replicas that may serve}. Nothing is removed if there are
-- such replicas. Beside a silent one that is no longer listed, because there were too many, stands ` forgotten`.

local DAY_MS, SLICE_KEYS = 86400000, 1000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local rows = redis.pcall('ZRANGEBYSCORE', KEYS[3], '-inf', '+inf', 'WITHSCORES')
if rows.err then
  if not rows.err:find('WRONGTYPE') then
    return redis.error_reply(rows.err)
  end
  rows = {}
end

local registered, silent, others = {}, {}, {}
for i = 1, #rows, 2 do
  local member, score = rows[i], tonumber(rows[i + 1])
  local ends = math.floor(score)
  if member:sub(1, 1) ~= ' ' then
    others[#others + 1] = ARGV[1] .. member
    if ends > now then
      registered[#registered + 1] = member
    elseif now - ends < DAY_MS and (score - ends) * 4 ~= 2 then
      silent[#silent + 1] = member
    end
  elseif member == ' forgotten' and ends > now then
    silent[#silent + 1] = member
  end
end
if #registered > 0 or #silent > 0 then
  return {0, registered, silent}
end

for i = 4, #KEYS do
  others[#others + 1] = KEYS[i]
end
local removed = redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
for i = 1, #others, SLICE_KEYS do
  removed = removed + redis.call('DEL', unpack(others, i, math.min(i + SLICE_KEYS - 1, #others)))
end
return {removed, {}, {}}
