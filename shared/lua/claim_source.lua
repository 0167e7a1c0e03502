-- Who a server fetches a part of a version from: a server that holds it, else the store; each has so many slots.
-- KEYS[1] prefix of the sources' slots (sorted sets: claimant, until when its slot is its own, ms); one hash tag, one node
-- KEYS[2..] holders of the part (sorted sets: URL, until when it is surely there, ms)
-- ARGV[1] claimant   ARGV[2] lifetime of a claim, ms   ARGV[3] slots of a server, 0 to take none
-- ARGV[4] slots of the store, 0 for none   ARGV[5] name of the store   ARGV[6] random integer
-- ARGV[7] holders that are tried   ARGV[8] longest time a holder is taken to hold, ms   ARGV[9..] sources not to take
-- Returns {source, n} when a slot was taken, {'', n} when all that were tried are, {'nobody', n} when there is none to
-- take; n: holders that may be taken.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local without = {[ARGV[1]] = true}
for i = 9, #ARGV do without[ARGV[i]] = true end

local function alive(key, longest)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', key, '(' .. (now + longest), '+inf') -- made before the clock was set back
end

local function take(source, slots)
  local key = KEYS[1] .. source
  alive(key, ARGV[2])
  if redis.call('ZSCORE', key, ARGV[1]) or redis.call('ZCARD', key) < slots then
    redis.call('ZADD', key, now + ARGV[2], ARGV[1])
    redis.call('PEXPIRE', key, ARGV[2])
    return true
  end
  return false
end

-- A few of them, whatever their number: a poll costs the same in a fleet of ten thousand.
local count, tried = 0, {}
for k = 2, ARGV[3] == '0' and 1 or #KEYS do
  alive(KEYS[k], ARGV[8])
  count = count + redis.call('ZCARD', KEYS[k])
  for url in pairs(without) do
    if redis.call('ZSCORE', KEYS[k], url) then count = count - 1 end
  end
  for _, url in ipairs(redis.call('ZRANDMEMBER', KEYS[k], ARGV[7])) do
    if not without[url] then tried[#tried + 1] = url end
  end
end
for i = 0, #tried - 1 do
  local source = tried[(ARGV[6] + i) % #tried + 1] -- a few are drawn in order, so from anywhere on
  if take(source, tonumber(ARGV[3])) then return {source, count} end
end
-- The store only while no server has it: so its uplink carries few copies, however many servers there are.
if count > 0 then return {'', count} end
if ARGV[4] == '0' then return {'nobody', 0} end
if take(ARGV[5], tonumber(ARGV[4])) then return {ARGV[5], 0} end
return {'', 0}
